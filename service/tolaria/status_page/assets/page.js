// Puts the page together: keeps the newest sections and curves, and shows what a frame has changed.

import { Chart } from "./charts.js";
import { byId, setText, whole } from "./dom.js";
import { runName, showOverview } from "./overview.js";
import { showSeeds } from "./seeds.js";
import { Stream } from "./stream.js";
import { showFigures, showIncidents, showPoints, showRanks, showSafety } from "./tables.js";

const data = {};
const curves = new Map();
const announced = { state: "", incident: null, link: "" };

const charts = [
  new Chart(byId("chart-loss"), {
    title: "Loss", series: () => [["loss", "training", "a"], ["validation_loss", "validation", "b"]], logScale: true,
  }),
  new Chart(byId("chart-accuracy"), {
    title: "Validation accuracy", series: () => [["accuracy", "accuracy", "c"]], percent: true,
  }),
  new Chart(byId("chart-rate"), {
    title: "Learning rate", series: rates, logScale: true, stepped: true,
  }),
  new Chart(byId("chart-boundary"), {
    title: "Epoch boundary, ms", series: () => [["boundary_ms", "delay of training", "d"]],
    limit: () => data.boundary?.budget_ms ?? null, limitName: "budget", fromZero: true,
    note: () => (data.boundary?.over ? `${whole(data.boundary.over)} over budget` : ""),
  }),
];

// A group that is gone has a curve that ends.
function rates() {
  const keys = [...curves.keys()].filter((key) => key.startsWith("rate/"));
  return keys.map((key, place) => {
    const group = key.slice("rate/".length);
    return [key, group, "abcdef"[place % 6], group in data.rates.current];
  });
}

function take(frame, isFull) {
  if (isFull) curves.clear();
  for (const [name, { at, points }] of Object.entries(frame.curves)) {
    const kept = isFull ? [] : (curves.get(name) ?? []).slice(0, at);
    curves.set(name, kept.concat(points));
  }
  delete frame.curves;
  Object.assign(data, frame);
  show(frame, isFull);
}

function show(frame, isFull) {
  const has = (...names) => isFull || names.some((name) => name in frame);
  if (has("run", "state", "clock")) showOverview(data);
  for (const chart of charts) chart.show(curves, data);
  if (has("seeds", "state", "marks")) showSeeds(byId("seeds"), data);
  byId("seeds-card").hidden = !data.run.controlled && data.seeds.length === 0;
  byId("chart-boundary").hidden = !data.run.controlled;
  byId("chart-accuracy").hidden = !curves.get("accuracy")?.length && curves.get("validation_loss")?.length > 0;
  if (has("incidents")) showIncidents(byId("incidents"), data.incidents);
  if (has("points")) showPoints(byId("points"), data.points, data.state);
  if (has("breakers", "state", "rates", "boundary")) showSafety(byId("safety"), data);
  byId("figures-card").hidden = !showFigures(byId("figures"), data, curves);
  if (has("ranks", "run")) showRanks(byId("ranks"), data.ranks, data.run);
  announce();
}

// Only what a listener has to know: changes of state, and new incidents.
function announce() {
  const { state, incidents } = data;
  const sentences = [];
  if (announced.state && announced.state !== state.state) {
    sentences.push(`The run is ${state.state}${state.reason ? `: ${state.reason}` : ""}.`);
  }
  const newest = incidents.rows[0];
  const key = newest ? `${newest.at_ms} ${newest.kind}` : "";
  if (announced.incident !== null && key && announced.incident !== key) {
    sentences.push(`New incident at step ${newest.step}: ${newest.kind.replaceAll("_", " ")}, ${newest.reason}.`);
  }
  announced.state = state.state;
  announced.incident = key;
  if (sentences.length) setText(byId("announcer"), sentences.join(" "));
}

function link(state, text) {
  const node = byId("link");
  node.dataset.link = state;
  setText(node, state === "live" ? "live" : state);
  const banner = byId("banner");
  const at = data.clock ? ` Last data: ${new Date(data.clock.now_ms).toLocaleTimeString("en-GB")}.` : "";
  setText(banner, state === "live" ? "" : text + at);
  banner.hidden = state === "live";
  if (state !== announced.link && announced.link) setText(byId("announcer"), state === "live" ? "Connected again." : text);
  announced.link = state;
  if (state === "stopped" && data.run) document.title = `stopped: ${runName(data)} – Tolaria`;
}

new Stream(take, link);
