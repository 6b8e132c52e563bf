"use strict";
const rows = [...document.querySelectorAll("#studies tbody tr")], body = document.querySelector("#studies tbody");
const number = cell => { const v = parseFloat(cell.dataset.value); return Number.isNaN(v) ? -Infinity : v; };
document.querySelectorAll("#studies th button").forEach((button, at) => button.addEventListener("click", () => {
  const heading = button.parentElement, down = heading.getAttribute("aria-sort") === "ascending";
  document.querySelectorAll("#studies th").forEach(other => other.removeAttribute("aria-sort"));
  heading.setAttribute("aria-sort", down ? "descending" : "ascending");
  const text = row => row.cells[at].textContent.trim(), sign = down ? -1 : 1, isText = "text" in heading.dataset;
  rows.sort((a, b) => sign * (isText ? text(a).localeCompare(text(b), "en", {numeric: true}) : number(a.cells[at]) - number(b.cells[at])));
  body.append(...rows);
}));
const search = document.querySelector("#search"), count = document.querySelector("#count");
const filter = () => {
  const asked = search.value.trim().toLowerCase();
  let shown = 0;
  for (const row of rows) {
    row.hidden = !row.textContent.toLowerCase().includes(asked);
    document.getElementById(row.dataset.study).hidden = row.hidden;
    shown += !row.hidden;
  }
  count.textContent = `${shown} of ${rows.length} shown`;
};
search.addEventListener("input", filter);
document.querySelector("#find").hidden = false;
const open = () => {
  const study = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (study && study.tagName === "DETAILS") { study.open = true; study.scrollIntoView(); }
};
addEventListener("hashchange", open);
open();
addEventListener("beforeprint", () => document.querySelectorAll("details.study").forEach(study => study.open = true));
document.querySelectorAll(".film").forEach(film => {
  const slider = film.querySelector("input"), play = film.querySelector("button"), strip = film.querySelector("img");
  const mark = film.querySelector(".now"), last = Number(slider.max);
  const places = film.dataset.places.split(" ");
  let timer = 0;
  const show = () => {
    strip.style.left = `${-100 * slider.value}%`;
    mark.setAttribute("x", places[slider.value]);
  };
  const stop = () => { clearInterval(timer); timer = 0; play.textContent = "Play"; };
  slider.addEventListener("input", () => { stop(); show(); });
  play.addEventListener("click", () => {
    if (timer) return stop();
    play.textContent = "Pause";
    timer = setInterval(() => { slider.value = slider.value < last ? Number(slider.value) + 1 : 0; show(); }, 120);
  });
  film.querySelector(".controls").hidden = false;
});
