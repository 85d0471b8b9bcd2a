// Elements and texts. Everything that is shown goes through text nodes and attributes: nothing is parsed as markup.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

export function element(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

export function shape(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) node.setAttribute(name, String(value));
  }
  node.append(...present(children));
  return node;
}

const present = (children) => children.filter((child) => child !== null && child !== undefined);

export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// Replaces the content of a node, and keeps which of its details are open, and where its boxes are scrolled to.
export function replaceContent(node, ...children) {
  const kept = new Map([...node.querySelectorAll("[data-key]")].map((it) => [it.dataset.key, it]));
  const focused = document.activeElement?.closest?.("[data-key]")?.dataset.key;
  const scrolled = new Map([...kept].map(([key, it]) => [key, it.scrollTop]));
  node.replaceChildren(...present(children));
  for (const it of node.querySelectorAll("[data-key]")) {
    if (kept.get(it.dataset.key)?.open) it.open = true;
    it.scrollTop = scrolled.get(it.dataset.key) ?? 0;
    if (it.dataset.key === focused) (it.querySelector("summary") ?? it).focus({ preventScroll: true });
  }
}

export function table(caption, heads, rows, key) {
  const head = element("tr", {}, ...heads.map((text) => element("th", { scope: "col" }, text)));
  const body = rows.map((cells) => element("tr", {}, ...cells.map((cell) => element("td", {}, cell))));
  const made = element("table", {}, element("caption", { class: "hidden" }, caption),
    element("thead", {}, head), element("tbody", {}, ...body));
  return element("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption, "data-key": key }, made);
}

// -- texts -----------------------------------------------------------------------------------------------------------

const WHOLE = new Intl.NumberFormat("en");

export const whole = (value) => (value === null || value === undefined ? "–" : WHOLE.format(value));

export function figure(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-4) return value.toExponential(Math.max(0, digits - 2)).replace(/\.?0+e/, "e");
  return size >= 1e3 ? WHOLE.format(Math.round(value)) : String(Number(value.toPrecision(digits)));
}

export const percent = (value) => (value === null || value === undefined ? "–" : `${(100 * value).toFixed(2)} %`);

export function bytes(count) {
  for (const unit of ["B", "KB", "MB", "GB"]) {
    if (count < 1024) return `${count < 10 && unit !== "B" ? count.toFixed(1) : Math.round(count)} ${unit}`;
    count /= 1024;
  }
  return `${count.toFixed(1)} TB`;
}

export function duration(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${(seconds / 3600).toFixed(1)} h` : `${(seconds / 86400).toFixed(1)} d`;
}

export function time(ms) {
  const at = new Date(ms);
  const today = at.toDateString() === new Date().toDateString();
  const clock = at.toLocaleTimeString("en-GB");
  const text = today ? clock : `${at.toLocaleDateString("en-CA")} ${clock}`;
  return element("time", { datetime: at.toISOString() }, text);
}
