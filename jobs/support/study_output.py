"""What predict and measure collect and print about the studies they measured."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

from heartseg.inference import study_results
from heartseg.inference.study_results import ClipResult
from heartseg.reporting import studies_page
from jobs.support.command_line import counted

MOST_UNSURE = 5  # files with a line each


@dataclass
class Studies:
    """Studies collected clip by clip, in any number: only the masks of one patient's clips are in memory at a time.

    `rows` and, for the page, `described` have an entry for each patient, `done` one for each clip, without masks.
    """

    out: str
    with_page: bool
    calibrations: Mapping[str, dict | None] = field(default_factory=dict)
    rows: list[dict] = field(default_factory=list)
    described: list[dict] = field(default_factory=list)
    done: list[ClipResult] = field(default_factory=list)
    open: list[ClipResult] = field(default_factory=list)

    def add(self, result: ClipResult) -> None:
        """Add a clip; a patient's clips must be added one after another."""
        if self.open and self.open[0].clip.patient != result.clip.patient:
            self.close()
        self.open.append(result)

    def close(self) -> None:
        """Measure the last patient; call it after the last clip."""
        if self.open:
            row = study_results.study_row(self.open[0].clip.patient, self.open, self.calibrations)
            self.rows.append(row)
            if self.with_page:
                self.described.append(studies_page.describe_study(self.out, row, self.open))
            self.done += [result.without_masks() for result in self.open]
            self.open = []


def print_results(rows: list[dict], done: list[ClipResult], damaged: list[dict], shown: int = 20) -> None:
    """Print the first patients' ejection fractions, and the files to check; the tables have everything."""
    remarks = {found.clip.patient: found.clip.remark for found in done if found.clip.remark}
    noted = {found.clip.stem: "; ".join(found.notes) for found in done if found.notes}
    doubted = {found.clip.stem: "; ".join(found.doubts) for found in done if found.doubts}
    unsure = [stem for stem, text in doubted.items() if text.startswith(study_results.UNSURE)]
    if len(unsure) > MOST_UNSURE:  # a line for each would hide the other doubts
        doubted = {stem: text for stem, text in doubted.items() if stem not in unsure}
    print("\n".join(map(study_results.headline, rows[:shown])))
    if len(rows) > shown:
        print(f"… and {len(rows) - shown} more in ef.csv")
    for begin, texts in (("note on", remarks | noted), ("check", doubted)):
        for name, text in itertools.islice(texts.items(), shown):
            print(f"{begin} {name}: {study_results.shorten(text)}")
    if len(unsure) > MOST_UNSURE:
        print(f"check {counted(len(unsure), 'file')} the network is unsure of, such as {unsure[0]}: see `doubts` in ef.csv")
    for entry in damaged:
        print(f"left out: {entry['input']} {entry['reason']}")
    counts = {"file": len(done), "frame": sum(found.frames for found in done), "patient": len(rows)}
    print(f"{', '.join(counted(number, noun) for noun, number in counts.items())}; {len(damaged)} left out.")
    print(f"{study_results.INTENDED_USE.capitalize()}.")
