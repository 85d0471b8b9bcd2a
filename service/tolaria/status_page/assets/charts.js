// Curves as SVG, with axes, marks of rollbacks, a readout under the pointer, and a table behind each.

import { element, figure, percent, replaceContent, setText, shape, table, whole } from "./dom.js";

const HEIGHT = 190;
const MARGIN = { left: 52, right: 12, top: 10, bottom: 22 };
const LOG_FROM = 30;

// Returns at most `count` round numbers within a range.
export function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const size = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * size).find((each) => each >= rough);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-9; at += step) found.push(Number(at.toPrecision(12)));
  return found;
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) {
    for (const factor of high / low < 1000 ? [1, 2, 5] : [1]) {
      const at = factor * 10 ** power;
      if (at >= low * 0.999 && at <= high * 1.001) found.push(Number(at.toPrecision(6)));
    }
  }
  return found.filter((_, place) => place % Math.ceil(found.length / 6) === 0);
}

export function compact(step) {
  if (step >= 1e6) return `${Number((step / 1e6).toPrecision(4))}M`;
  return step >= 1e4 ? `${Number((step / 1e3).toPrecision(4))}k` : whole(step);
}

// Steps that all charts and the timeline share.
export function stepRange(data) {
  const first = data.run.first_step;
  return [first, Math.max(data.state.step, first + 1)];
}

export class Chart {
  constructor(figureNode, spec) {
    this.node = figureNode;
    this.spec = spec;
    this.lines = [];
    this.legend = element("p", { class: "legend" });
    this.readout = element("p", { class: "readout number", "aria-hidden": "true" });
    this.plot = element("div", { class: "plot" });
    this.details = element("details", { class: "behind" }, element("summary", {}, `Table: ${spec.title}`));
    const head = element("figcaption", {}, element("h3", {}, spec.title), this.legend, this.readout);
    figureNode.append(head, this.plot, this.details);
    this.details.addEventListener("toggle", () => this.#showTable());
    this.plot.addEventListener("pointermove", (event) => this.#point(event));
    this.plot.addEventListener("pointerleave", () => this.#leave());
    new ResizeObserver(() => this.data && this.#draw()).observe(this.plot);
  }

  show(curves, data) {
    this.data = data;
    this.lines = this.spec.series().map(([key, name, tone, goesOn = true]) =>
      ({ name, tone, goesOn, points: curves.get(key) ?? [] }));
    this.lines = this.lines.filter(({ points }) => points.length > 0);
    const note = this.spec.note?.() ?? "";
    const limit = this.spec.limit?.() ?? null;
    const drawn = JSON.stringify([this.lines.map(({ name, goesOn, points }) => [name, goesOn, points.length, points.at(-1)]),
      stepRange(data), data.marks.length, data.marks.at(-1), note, limit]);
    if (drawn !== this.drawn) {
      this.drawn = drawn;
      this.#draw();
    }
  }

  #draw() {
    this.width = Math.max(200, this.plot.clientWidth);
    const latest = this.lines.filter(({ goesOn }) => goesOn).map(({ name, tone, points }) => element("span", { class: `key tone-${tone}` },
      element("span", { class: "swatch", "aria-hidden": "true" }), `${name} `,
      element("strong", { class: "number" }, this.#value(points.at(-1)[4]))));
    const note = this.spec.note?.() ?? "";
    replaceContent(this.legend, ...latest, note ? element("span", { class: "note" }, note) : null);
    if (!this.lines.length) {
      this.scale = null;
      replaceContent(this.plot, element("p", { class: "empty" }, "No values yet"));
      return;
    }
    this.scale = this.#scales();
    const height = HEIGHT;
    const image = shape("svg", { role: "img", "aria-label": this.#summary(), width: this.width, height,
      viewBox: `0 0 ${this.width} ${height}` }, ...this.#axes(), ...this.#marks(), ...this.#limit(),
    ...this.lines.flatMap((line) => this.#line(line)), this.cursor = shape("g", { class: "cursor" }));
    replaceContent(this.plot, image);
  }

  #scales() {
    const points = this.lines.flatMap((line) => line.points);
    let low = Infinity, high = -Infinity;
    for (const [, , lowest, highest] of points) {
      low = Math.min(low, lowest);
      high = Math.max(high, highest);
    }
    const limit = this.spec.limit?.() ?? null;
    if (limit !== null) high = Math.max(high, limit);
    const log = Boolean(this.spec.logScale) && low > 0 && high / low > LOG_FROM;
    if (this.spec.fromZero) low = Math.min(0, low);
    if (!log) {
      const room = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
      high += room;
      low = low >= 0 && low - room < 0 ? 0 : low - room;
      if (this.spec.percent) high = Math.min(high, Math.max(1, high - room));
    }
    const [first, last] = stepRange(this.data);
    const inner = this.width - MARGIN.left - MARGIN.right;
    const tall = HEIGHT - MARGIN.top - MARGIN.bottom;
    const part = log
      ? (value) => (Math.log10(value) - Math.log10(low)) / (Math.log10(high) - Math.log10(low) || 1)
      : (value) => (value - low) / (high - low || 1);
    return {
      log, low, high, first, last,
      x: (step) => MARGIN.left + ((Math.min(Math.max(step, first), last) - first) / (last - first)) * inner,
      y: (value) => MARGIN.top + (1 - part(value)) * tall,
    };
  }

  #axes() {
    const { x, y, log, low, high, first, last } = this.scale;
    const rows = log ? logTicks(low, high) : ticks(low, high, 4);
    const texts = rows.map((value) => (this.spec.percent ? `${figure(100 * value, 3)} %` : figure(value, 3)));
    const across = ticks(first, last, Math.max(2, Math.floor(this.width / 110))).filter(Number.isInteger);
    const bottom = HEIGHT - MARGIN.bottom;
    return [
      ...rows.map((value) => shape("line", { class: "grid", x1: MARGIN.left, x2: this.width - MARGIN.right,
        y1: y(value), y2: y(value) })),
      ...rows.map((value, place) => shape("text", { class: "tick", x: MARGIN.left - 6, y: y(value) + 4,
        "text-anchor": "end" }, texts[place])),
      ...across.map((step) => shape("text", { class: "tick", x: x(step), y: bottom + 16,
        "text-anchor": x(step) > this.width - 40 ? "end" : "middle" }, compact(step))),
      shape("line", { class: "axis", x1: MARGIN.left, x2: this.width - MARGIN.right, y1: bottom, y2: bottom }),
      log ? shape("text", { class: "tick", x: 4, y: HEIGHT - 6 }, "log") : null,
    ].filter(Boolean);
  }

  #marks() {
    const { x, first } = this.scale;
    return this.data.marks.filter(({ restored }) => restored >= first).flatMap((mark) => {
      const at = x(mark.restored);
      const text = `${mark.kind === "lane" ? "Lane restarted" : "Rolled back"} from step ${whole(mark.left)} to ${whole(mark.restored)}: ${mark.reason}`;
      return [shape("g", { class: `mark mark-${mark.kind}` }, shape("title", {}, text),
        shape("line", { x1: at, x2: at, y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom }),
        shape("path", { d: `M${at - 5} ${MARGIN.top - 4} h10 l-5 7 z` }))];
    });
  }

  #limit() {
    const limit = this.spec.limit?.() ?? null;
    if (limit === null) return [];
    const at = this.scale.y(limit);
    const text = `${this.spec.limitName} ${figure(limit, 3)}`;
    return [shape("line", { class: "limit", x1: MARGIN.left, x2: this.width - MARGIN.right, y1: at, y2: at }),
      shape("text", { class: "tick limit-text", x: this.width - MARGIN.right, y: at - 4, "text-anchor": "end" }, text)];
  }

  #line({ tone, goesOn, points }) {
    const { x, y } = this.scale;
    const middle = ([begin, end]) => x((begin + end) / 2);
    const upper = points.map((point) => `${middle(point).toFixed(1)} ${y(point[3]).toFixed(1)}`);
    const lower = points.map((point) => `${middle(point).toFixed(1)} ${y(point[2]).toFixed(1)}`).reverse();
    const path = points.map((point, place) => {
      const [across, up] = [middle(point).toFixed(1), y(point[4]).toFixed(1)];
      if (place === 0) return `M${across} ${up}`;
      return this.spec.stepped ? `H${across} V${up}` : `L${across} ${up}`;
    });
    if (this.spec.stepped && goesOn) path.push(`H${x(this.scale.last).toFixed(1)}`);
    const spread = points.some((point) => point[2] !== point[3]);
    return [
      spread ? shape("path", { class: `band tone-${tone}`, d: `M${[...upper, ...lower].join(" L")} Z` }) : null,
      shape("path", { class: `curve tone-${tone}`, d: path.join(" ") }),
      ...(points.length < 40 && !this.spec.stepped ? points.map((point) => shape("circle", { class: `dot tone-${tone}`,
        cx: middle(point), cy: y(point[4]), r: 2 })) : []),
    ].filter(Boolean);
  }

  #value(value) {
    return this.spec.percent ? percent(value) : figure(value);
  }

  #summary() {
    const parts = this.lines.map(({ name, points }) => {
      const lowest = Math.min(...points.map((point) => point[2]));
      const highest = Math.max(...points.map((point) => point[3]));
      return `${name}: now ${this.#value(points.at(-1)[4])}, from ${this.#value(lowest)} to ${this.#value(highest)}`;
    });
    const back = this.data.marks.length;
    const marks = back ? `; the run went back ${back} ${back === 1 ? "time" : "times"}` : "";
    return `${this.spec.title} by step. ${parts.join("; ")}${marks}. The table below has the values.`;
  }

  #point(event) {
    if (!this.scale) return;
    const at = event.clientX - this.plot.getBoundingClientRect().left;
    const nearest = this.lines.map((line) => [line, line.points.reduce((best, point) => {
      const away = Math.abs(this.scale.x((point[0] + point[1]) / 2) - at);
      return away < best[0] ? [away, point] : best;
    }, [Infinity, null])[1]]);
    const first = nearest[0][1];
    const across = this.scale.x((first[0] + first[1]) / 2);
    replaceContent(this.cursor, shape("line", { x1: across, x2: across, y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom }),
      ...nearest.map(([{ tone }, point]) => shape("circle", { class: `dot tone-${tone}`,
        cx: this.scale.x((point[0] + point[1]) / 2), cy: this.scale.y(point[4]), r: 3.5 })));
    const values = nearest.map(([{ name }, point]) => `${name} ${this.#value(point[4])}${point[2] === point[3] ? "" : ` (${this.#value(point[2])} to ${this.#value(point[3])})`}`);
    setText(this.readout, `step ${steps(first)}: ${values.join(", ")}`);
  }

  #leave() {
    setText(this.readout, "");
    if (this.cursor) replaceContent(this.cursor);
  }

  #showTable() {
    if (!this.details.open) return;
    const rows = this.lines.flatMap(({ name, points }) => points.map((point) =>
      [name, steps(point), this.#value(point[2]), this.#value(point[4]), this.#value(point[3])])).reverse();
    const shown = table(`${this.spec.title} by step, newest first`, ["Curve", "Steps", "Lowest", "Mean", "Highest"],
      rows, `table-${this.spec.title}`);
    this.details.querySelector(".scroll")?.remove();
    this.details.append(shown);
  }
}

export function steps([first, last]) {
  return first === last ? whole(first) : `${whole(first)} to ${whole(last)}`;
}
