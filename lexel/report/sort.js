// Tables whose rows sort by a column when its head is clicked, or pressed with Enter.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const value = (row, at) => { const text = row.cells[at].textContent.trim(), number = parseFloat(text); return Number.isNaN(number) ? text : number; };
  heads.forEach((head, at) => {
    head.tabIndex = 0;
    head.style.cursor = "pointer";
    const sort = () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...body.rows].sort((a, b) => {
        const [one, other] = [value(a, at), value(b, at)];
        const order = typeof one === "number" && typeof other === "number" ? one - other : String(one).localeCompare(String(other));
        return down ? -order : order;
      });
      body.append(...rows);
    };
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
  });
}
