"""What predict and measure print about the studies they measured."""

import itertools

from heartseg.inference import study_results
from jobs.support.command_line import counted

MOST_UNSURE = 5  # files with a line each


def print_results(rows: list[dict], done: list[study_results.ClipResult], damaged: list[dict], shown: int = 20) -> None:
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
