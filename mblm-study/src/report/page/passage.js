(() => {
  // Two variants are compared on the bytes of a passage. The page comes with the first two.
  const passage = document.getElementById("passage");
  if (!passage) return;
  const bits = JSON.parse(document.getElementById("bits").textContent);
  const cells = [...passage.querySelectorAll("i")];
  const names = cells.map((cell) => cell.title.slice(0, cell.title.lastIndexOf(": ")));
  const pair = document.getElementById("pair");
  const [first, second] = pair.querySelectorAll("select");
  const steps = [25, 50, 100, 200];
  const chosen = (select) => ({ name: select.selectedOptions[0].text, bits: bits[select.value] });
  const mean = (bits) => (bits.reduce((sum, bits) => sum + bits, 0) / 100 / bits.length).toFixed(3);
  const isolated = (name) => Object.assign(document.createElement("bdi"), { textContent: name });

  const compare = () => {
    const [a, b] = [chosen(first), chosen(second)];
    cells.forEach((cell, i) => {
      const [x, y] = [a.bits[i], b.bits[i]];
      const step = steps.filter((from) => Math.abs(x - y) >= from).length;
      cell.className = step ? (x < y ? "a" : "b") + step : "";
      cell.title = `${names[i]}: ${(x / 100).toFixed(2)} and ${(y / 100).toFixed(2)} bits`;
    });
    document.getElementById("sums").replaceChildren(
      isolated(a.name), ` spends ${mean(a.bits)} bits per byte here, and `, isolated(b.name), ` spends ${mean(b.bits)}.`,
    );
  };

  // A byte is told of in words when it is pointed at, touched, or reached by the arrow keys.
  let at = -1;
  const tell = (i) => {
    if (i < 0 || i >= cells.length) return;
    cells[at]?.removeAttribute("data-at");
    at = i;
    cells[at].setAttribute("data-at", "");
    const [a, b] = [chosen(first), chosen(second)];
    document.getElementById("byte").replaceChildren(
      `${names[at]}: `, isolated(a.name), ` ${(a.bits[at] / 100).toFixed(2)} bits, `,
      isolated(b.name), ` ${(b.bits[at] / 100).toFixed(2)}`,
    );
  };
  const cell = (event) => cells.indexOf(event.target.closest("i"));
  passage.addEventListener("pointerover", (event) => tell(cell(event)));
  passage.addEventListener("click", (event) => tell(cell(event)));
  passage.addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!move) return;
    event.preventDefault();
    tell(Math.max(at + move, 0));
    cells[at].scrollIntoView({ block: "nearest" });
  });

  [first, second].forEach((select) => select.addEventListener("change", () => { compare(); tell(at); }));
  pair.hidden = false;
  compare();
})();
