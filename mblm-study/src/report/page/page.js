(() => {
  // One variant stands out in all charts while it is pointed at, or until it is clicked again.
  const marked = [...document.querySelectorAll("[data-v]")];
  const chips = [...document.querySelectorAll("button.chip")];
  let pinned = null;
  const show = (variant) => {
    document.body.classList.toggle("hl", variant !== null);
    marked.forEach((element) => element.classList.toggle("on", element.dataset.v === variant));
  };
  const pin = (variant) => {
    pinned = variant;
    chips.forEach((chip) => chip.setAttribute("aria-pressed", String(chip.dataset.v === pinned)));
    show(pinned);
  };
  marked.forEach((element) => {
    const variant = element.dataset.v;
    element.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && pinned === null && show(variant));
    element.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && pinned === null && show(null));
    if (element.matches(".chip, .s")) element.addEventListener("click", () => pin(pinned === variant ? null : variant));
  });
  addEventListener("keydown", (event) => event.key === "Escape" && pin(null));

  // A click on a column's name sorts by it, another one the other way round.
  document.querySelectorAll("table.ranking").forEach((table) => {
    const body = table.tBodies[0];
    table.querySelectorAll("th button").forEach((button) => {
      const head = button.closest("th");
      button.addEventListener("click", () => {
        const first = head.dataset.first || "ascending";
        const other = first === "ascending" ? "descending" : "ascending";
        const order = head.getAttribute("aria-sort") === first ? other : first;
        table.querySelectorAll("th").forEach((th) => th.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", order);
        const value = (row) => row.cells[head.cellIndex].dataset.sort ?? "";
        const compare = (a, b) => {
          const [x, y] = [value(a), value(b)];
          if (x === "" || y === "") return (x === "") - (y === "");
          const difference = Number.isNaN(Number(x)) ? x.localeCompare(y) : x - y;
          return order === "ascending" ? difference : -difference;
        };
        [...body.rows].sort(compare).forEach((row) => body.append(row));
      });
    });
  });
})();
