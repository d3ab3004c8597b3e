// The threshold's line in the chart and its slider are one thing: whoever moves, the other follows.
(() => {
  const low = Math.log(0.003 / 0.997), high = Math.log(0.9997 / 0.0003);
  const slider = () => document.querySelector(".dy-slider input[type=range]");
  const probability = (x) => 1 / (1 + Math.exp(-x));
  const shown = (p) => Number(p.toPrecision(p > 0.9 ? 5 : 3));

  document.addEventListener("input", (event) => {
    const box = event.target.closest?.(".dy-slider");
    if (!box) return;
    const [range, number] = box.querySelectorAll("input");
    if (event.target === range) number.value = shown(probability(Number(range.value)));
    else range.value = Math.log(number.value / (1 - number.value));
    const plot = document.querySelector(".dy-heads svg"), line = plot?.querySelector(".dy-threshold");
    const at = Number(plot?.dataset.height) * (1 - (Number(range.value) - low) / (high - low));
    line?.setAttribute("transform", `translate(0 ${at})`);
  });

  document.addEventListener("pointerdown", (event) => {
    if (!event.target.closest?.(".dy-threshold") || !slider()) return;
    event.preventDefault();
    const box = event.target.closest("svg").getBoundingClientRect();
    const move = (e) => {
      slider().value = low + (high - low) * (1 - (e.clientY - box.top) / box.height);
      slider().dispatchEvent(new Event("input", { bubbles: true }));
    };
    document.addEventListener("pointermove", move);
    document.addEventListener("pointerup", () => {
      document.removeEventListener("pointermove", move);
      slider().dispatchEvent(new Event("change", { bubbles: true }));
    }, { once: true });
  });
})();
