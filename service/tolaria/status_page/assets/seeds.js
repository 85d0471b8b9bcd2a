// Seeds as a timeline: a band for each stage over the steps of the run, and alpha as a line in it.

import { compact, stepRange, ticks } from "./charts.js";
import { element, figure, replaceContent, shape, table, whole } from "./dom.js";

const HEIGHT = 26;

export function showSeeds(node, data) {
  if (data.seeds.length === 0) {
    replaceContent(node, element("p", { class: "empty" }, "No seed has been desired yet"));
    return;
  }
  const order = [...data.seeds].sort((one, other) => Number(!one.stage) - Number(!other.stage));
  const list = element("ul", { class: "seeds" }, ...order.map((seed) => row(seed, data)));
  const axis = element("div", { class: "seed-axis", "aria-hidden": "true" }, element("div"), axisOf(data));
  const stages = [...new Set(data.seeds.flatMap((seed) => seed.spans.map(([stage]) => stage)))];
  const legend = element("p", { class: "legend", "aria-hidden": "true" }, ...stages.map((stage) =>
    element("span", { class: "key" }, element("span", { class: `swatch stage-${stage}` }), stage)),
  element("span", { class: "key" }, element("span", { class: "swatch alpha-swatch" }), "alpha, 0 to 1"));
  const rows = data.seeds.flatMap((seed) => seed.spans.map(([stage, begin, end]) =>
    [seed.id, stage, whole(begin), end === null ? "now" : whole(end)]));
  const behind = element("details", { class: "behind", "data-key": "seeds-table" }, element("summary", {}, "Table: stages of seeds"),
    table("Stages of seeds by step", ["Seed", "Stage", "From step", "To step"], rows, "table-seeds"));
  replaceContent(node, legend, list, axis, behind);
}

function row(seed, data) {
  const about = [seed.blueprint, seed.slot && `in ${seed.slot}`].filter(Boolean).join(" ");
  const now = seed.stage ? [seed.stage, `alpha ${figure(seed.alpha, 3)}`] : ["gone"];
  if (seed.share !== null) now.push(`${figure(100 * seed.share, 3)} % of the gradient norms`);
  return element("li", { class: seed.stage ? "" : "gone" },
    element("div", { class: "seed-name" }, element("strong", {}, seed.id), element("span", { class: "muted" }, about),
      seed.refused ? element("span", { class: "refused" }, `refused: ${seed.refused}`) : null),
    image(HEIGHT, data, bands(seed, data)),
    element("p", { class: "seed-now number" }, now.join(" · ")));
}

function image(height, data, parts) {
  return shape("svg", { class: "track", "aria-hidden": "true", viewBox: `0 0 1000 ${height}`, height,
    preserveAspectRatio: "none" }, ...parts, ...data.marks.map(({ restored }) => markAt(restored, height, data)));
}

function place(step, data) {
  const [first, last] = stepRange(data);
  return (1000 * (Math.min(Math.max(step, first), last) - first)) / (last - first);
}

function bands(seed, data) {
  const spans = seed.spans.map(([stage, begin, end]) => {
    const from = place(begin, data);
    const to = place(end ?? data.state.step, data);
    return shape("rect", { class: `stage-${stage}`, x: from, y: 2, width: Math.max(2, to - from), height: HEIGHT - 4 });
  });
  const points = seed.alphas.map(([step, alpha]) => [place(step, data), HEIGHT - 4 - alpha * (HEIGHT - 8)]);
  if (points.length && seed.stage) points.push([place(data.state.step, data), points.at(-1)[1]]);
  const line = points.map(([across, up]) => `${across.toFixed(1)} ${up.toFixed(1)}`).join(" L");
  return line ? [...spans, shape("path", { class: "alpha", d: `M${line}` })] : spans;
}

function markAt(step, height, data) {
  const at = place(step, data);
  return shape("line", { class: "mark-line", x1: at, x2: at, y1: 0, y2: height });
}

function axisOf(data) {
  const [first, last] = stepRange(data);
  const labels = ticks(first, last, 5).filter(Number.isInteger).map((step) => {
    const label = element("span", {}, compact(step));
    label.style.left = `${place(step, data) / 10}%`;
    return label;
  });
  return element("div", { class: "ticks number" }, ...labels);
}
