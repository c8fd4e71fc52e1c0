"use strict";
// Sorts the table of heads by the column whose button is pressed: largest first, then smallest first; empty cells last.
const atlas = document.querySelector(".atlas");
const rows = [...atlas.tBodies[0].rows];
const headings = [...atlas.tHead.rows[0].cells];

function sortBy(column) {
  const heading = headings[column];
  const first = column === 0 ? "ascending" : "descending";
  const order = heading.ariaSort === first ? (first === "ascending" ? "descending" : "ascending") : first;
  for (const other of headings) other.ariaSort = other === heading ? order : "none";
  const sign = order === "ascending" ? 1 : -1;
  const value = (row) => row.cells[column].dataset.value;
  const place = (row) => Number(row.cells[0].dataset.value);
  rows.sort((a, b) => {
    const [one, other] = [value(a), value(b)];
    if (one === undefined || other === undefined) return (one === undefined) - (other === undefined) || place(a) - place(b);
    return sign * (Number(one) - Number(other)) || place(a) - place(b);
  });
  atlas.tBodies[0].append(...rows);
  document.getElementById("order").textContent = `Sorted by ${heading.textContent}, ${order}.`;
}

headings.forEach((heading, column) => heading.firstElementChild.addEventListener("click", () => sortBy(column)));
