// Incidents, restore points, breakers and control, metrics of the job, and ranks.

import { steps } from "./charts.js";
import { bytes, duration, element, figure, replaceContent, shape, table, time, whole } from "./dom.js";

const empty = (text) => element("p", { class: "empty" }, text);

// -- incidents -------------------------------------------------------------------------------------------------------

export function showIncidents(node, { rows, failure }) {
  const problem = failure ? element("p", { class: "refused" }, `The journal cannot be read: ${failure}`) : null;
  if (!rows.length) {
    replaceContent(node, problem, empty("No incidents"));
    return;
  }
  const items = rows.map((incident) => {
    const [what, tone] = describe(incident);
    return element("li", { class: `incident tone-${tone}` },
      element("p", {}, element("strong", {}, what), " ", element("span", { class: "muted number" },
        `step ${whole(incident.step)} · `, time(incident.at_ms))),
      element("p", { class: "reason" }, incident.reason));
  });
  replaceContent(node, problem, element("ol", { class: "incidents scroll", tabindex: 0, role: "list",
    "aria-label": "Incidents, newest first", "data-key": "incidents" }, ...items));
}

function describe({ kind, details }) {
  if (kind === "rollback") {
    const restored = details.outcome === "restored";
    const to = restored ? ` to step ${whole(Number(details.restored_step))}` : ` ${details.outcome.replaceAll("_", " ")}`;
    const by = details.origin ? ` by ${details.origin}` : "";
    return [`Rollback${to}${by}, ${details.tier}, ${figure(Number(details.latency_ms), 3)} ms`, restored ? "warn" : "bad"];
  }
  if (kind === "emergency") {
    const open = details.cleared === "no";
    return [`Emergency ${details.level}${open ? ", not cleared" : ", cleared"}`, open ? "bad" : "warn"];
  }
  if (kind === "lane_lost") return [`Lane restarted: ${(details.stage ?? "").replaceAll("_", " ")}`, "warn"];
  const stage = details.stage ? ` (${details.stage})` : "";
  return [`${kind.replaceAll("_", " ").replace(/^./, (letter) => letter.toUpperCase())}${stage}`, "bad"];
}

// -- restore points --------------------------------------------------------------------------------------------------

export function showPoints(node, { rows, total }, state) {
  const missing = state.no_snapshots ? element("p", { class: "refused" }, `No snapshots: ${state.no_snapshots}`) : null;
  if (!rows.length) {
    replaceContent(node, missing, empty("No restore points yet"));
    return;
  }
  const cells = rows.map((point) => [whole(point.step), whole(point.epoch), point.tier === "fast" ? "memory" : "disk",
    bytes(point.size), flags(point), time(point.at_ms)]);
  const more = total > rows.length ? element("p", { class: "muted" }, `${whole(total - rows.length)} more`) : null;
  replaceContent(node, missing, table("Restore points, newest step first",
    ["Step", "Epoch", "Tier", "Size", "Trust", "Captured"], cells, "points"), more);
}

function flags(point) {
  const word = point.superseded ? "superseded" : point.proven ? "proven" : point.suspect ? "suspect" : "not proven yet";
  const tone = point.proven && !point.superseded ? "good" : point.suspect ? "bad" : "calm";
  return element("span", { class: `flag tone-${tone}` }, word);
}

// -- safety and control ----------------------------------------------------------------------------------------------

export function showSafety(node, { breakers, state, rates, boundary, run }) {
  const facts = [
    ["Emergency", state.emergency || "none"],
    ["Conservative mode", state.conservative.length ? state.conservative.join(", ") : "off"],
  ];
  if (run.controlled) {
    facts.push(["Boundary", boundaryText(boundary)], ["Tamiyo", state.tamiyo || "not asked yet"],
      ["Kasmina", state.kasmina || "not asked yet"],
      ["Commands", `${whole(state.accepted)} accepted, ${whole(state.rejected)} rejected`]);
  }
  for (const [group, rate] of Object.entries(rates.current)) facts.push([`Rate of ${group}`, figure(rate)]);
  const others = rates.total - Object.keys(rates.current).length;
  if (others) facts.push(["Other groups", whole(others)]);
  for (const each of rates.adjustments.slice(-5)) {
    const until = each.until ? ` until step ${whole(each.until)}` : "";
    facts.push([`Adjusted by ${each.origin}`, `${each.change}${each.group ? ` for ${each.group}` : ""}${until}${each.reason ? `: ${each.reason}` : ""}`]);
  }
  const list = element("ul", { class: "breakers", "aria-label": "Circuit breakers" }, ...breakers.map(({ name, state: word }) =>
    element("li", { class: `flag tone-${word === "closed" ? "good" : word === "open" ? "bad" : "warn"}` },
      `${name.replaceAll("_", " ")} ${word.replaceAll("_", " ")}`)));
  replaceContent(node, element("h3", {}, "Breakers"), list, element("dl", { class: "facts scroll", tabindex: 0, "data-key": "facts" },
    ...facts.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value)))));
}

function boundaryText({ last_ms: last, p50_ms: p50, p99_ms: p99, budget_ms: budget }) {
  if (last === null) return "none yet";
  const of = budget === null ? "" : ` of ${figure(budget, 3)}`;
  return `${figure(last, 3)}${of} ms; p50 ${figure(p50, 3)}, p99 ${figure(p99, 3)}`;
}

// -- metrics of the job ----------------------------------------------------------------------------------------------

export function showFigures(node, { figures }, curves) {
  const rows = [...Object.entries(figures.evaluation).map((entry) => ["evaluation", ...entry]),
    ...Object.entries(figures.step).map((entry) => ["step", ...entry])];
  if (!rows.length) return false;
  const cells = rows.map(([kind, name, value]) => {
    const points = curves.get(`${kind}/${name}`) ?? [];
    const lowest = points.length ? Math.min(...points.map((point) => point[2])) : null;
    const highest = points.length ? Math.max(...points.map((point) => point[3])) : null;
    return [name, kind, element("strong", { class: "number" }, figure(value)), sparkline(points), figure(lowest), figure(highest)];
  });
  const behind = rows.flatMap(([kind, name]) => (curves.get(`${kind}/${name}`) ?? []).map((point) =>
    [name, kind, steps(point), figure(point[2]), figure(point[4]), figure(point[3])]).reverse());
  replaceContent(node, table("Latest metrics of the job", ["Metric", "Of", "Latest", "Curve", "Lowest", "Highest"], cells, "figures"),
    element("details", { class: "behind", "data-key": "figures-table" }, element("summary", {}, "Table: metrics of the job by step"),
      table("Metrics of the job by step", ["Metric", "Of", "Steps", "Lowest", "Mean", "Highest"], behind, "table-figures")));
  return true;
}

function sparkline(points) {
  if (points.length < 2) return "";
  const values = points.map((point) => point[4]);
  const low = Math.min(...values);
  const size = Math.max(...values) - low || 1;
  const first = points[0][0];
  const length = points.at(-1)[1] - first || 1;
  const path = points.map((point) => `${((140 * (point[1] - first)) / length).toFixed(1)} ${(21 - (18 * (point[4] - low)) / size).toFixed(1)}`);
  return shape("svg", { class: "spark", width: 140, height: 24, viewBox: "0 0 140 24", "aria-hidden": "true" },
    shape("path", { class: "curve tone-a", d: `M${path.join(" L")}` }));
}

// -- ranks -----------------------------------------------------------------------------------------------------------

export function showRanks(node, { rows, total }, run) {
  if (!rows.length) {
    replaceContent(node, empty(run.device ? `One process, on ${run.device}` : "The lane is being built"));
    return;
  }
  const cells = rows.map((rank) => [whole(rank.rank), `${rank.host} (machine ${rank.node})`, rank.device, String(rank.pid),
    ...(rank.memory === null ? ["–", "–", "–"] : [duration(rank.input_wait_s), duration(rank.rank_wait_s), bytes(rank.memory)])]);
  const more = total > rows.length ? element("p", { class: "muted" }, `${whole(total - rows.length)} more`) : null;
  replaceContent(node, table("Ranks; waits are those of the last epoch",
    ["Rank", "Host", "Device", "Process", "Wait for data", "Wait for ranks", "Memory"], cells, "ranks"), more);
}
