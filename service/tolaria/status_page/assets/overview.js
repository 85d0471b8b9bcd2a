// The head of the page: which run this is, its state, progress and key figures.

import { byId, duration, element, figure, percent, replaceContent, setText, whole } from "./dom.js";

const TONES = {
  running: "good", finished: "good", starting: "calm", draining: "calm", paused: "warn", recovering: "warn",
  halted: "bad", failed: "bad",
};

export const runName = ({ run }) => run.name || run.job;

export function showOverview(data) {
  const { run, state, clock } = data;
  setText(byId("run-name"), runName(data));
  const tags = Object.entries(run.tags).map(([name, value]) => `${name}=${value}`);
  const facts = [run.name ? run.job : "", `run ${run.id}`, run.device, ...tags];
  setText(byId("run-facts"), facts.filter(Boolean).join(" · "));
  document.title = `${state.state}: ${runName(data)} – Tolaria`;

  const pill = byId("state");
  setText(pill, state.state);
  pill.dataset.tone = TONES[state.state] ?? "calm";
  setText(byId("state-reason"), reasonOf(state, clock));
  const healthy = state.health === "healthy";
  setText(byId("state-health"), healthy ? "healthy" : `${state.health}${state.summary ? `: ${state.summary}` : ""}`);
  showProgress(run, state);
  showFigures(data);
  const since = run.first_step > 0 ? `, curves from step ${whole(run.first_step)} on` : "";
  setText(byId("footer"), `Tolaria ${run.version} · this process for ${duration(clock.uptime_s)}${since}`);
}

function reasonOf(state, clock) {
  const phase = state.phase && state.phase !== "stepping" ? `${state.phase} for ${duration(clock.phase_s)}` : "";
  return [state.reason, phase].filter(Boolean).join("; ");
}

function showProgress(run, state) {
  const ofEpoch = Math.min(1, state.epoch_step / Math.max(1, state.steps_per_epoch));
  const finished = state.state === "finished" && (run.steps ? state.step >= run.steps : state.epoch >= run.epochs);
  const byEpochs = (Math.max(0, state.epoch - 1) + ofEpoch) / Math.max(1, run.epochs);
  const ofRun = finished ? 1 : Math.min(1, run.steps ? state.step / run.steps : byEpochs);
  const ran = run.steps
    ? `${whole(state.step)} / ${whole(run.steps)} steps`
    : `${whole(state.epoch)} / ${whole(run.epochs)} epochs`;
  byId("run-progress").value = ofRun;
  byId("epoch-progress").value = ofEpoch;
  setText(byId("run-progress-text"), ran);
  setText(byId("epoch-progress-text"), `${whole(state.epoch_step)} / ${whole(state.steps_per_epoch)} steps`);
}

function showFigures({ run, state }) {
  const rows = [
    ["Step", whole(state.step), state.best_step > state.step ? `highest ${whole(state.best_step)}` : ""],
    ["Samples/s", figure(state.samples_per_s, 3), ""],
    ["Training loss", figure(state.loss), "this epoch"],
    ["Validation loss", figure(state.validation_loss), ""],
    ["Accuracy", percent(state.accuracy), ""],
    ["Skipped steps", whole(state.skipped), ""],
    ["Rollbacks", whole(state.rollbacks), `attempt ${whole(state.attempt)}`],
    ["Proven at", state.proven_step === null ? "–" : whole(state.proven_step), "newest restore point"],
  ];
  const evaluated = rows.filter(([name]) => run.evaluates || (name !== "Accuracy" && name !== "Validation loss"));
  const shown = evaluated.filter(([name]) => name !== "Accuracy" || state.accuracy !== null || state.validation_loss === null);
  replaceContent(byId("key-figures"), ...shown.map(([name, value, note]) => element("div", {},
    element("dt", {}, name), element("dd", { class: "number" }, value), note ? element("dd", { class: "note" }, note) : null)));
  byId("key-figures").dataset.run = run.id;
}
