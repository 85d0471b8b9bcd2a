// The connection to the service: frames as they come, and whether they still come.

const SILENT_MS = 8000;
const HIDDEN_MS = 60000;
const AGAIN_MS = 5000;

export class Stream {
  // `onFrame(frame, isFull)` and `onLink(state, text)`, whose states are live, waiting, lost and stopped.
  constructor(onFrame, onLink) {
    this.onFrame = onFrame;
    this.onLink = onLink;
    this.source = null;
    this.latest = 0;
    this.ended = false;
    setInterval(() => this.#check(), 1000);
    document.addEventListener("visibilitychange", () => this.#visibility());
    this.open();
  }

  open() {
    this.close();
    this.latest = Date.now();
    this.source = new EventSource("page/events");
    this.source.addEventListener("full", (event) => this.#take(event, true));
    this.source.addEventListener("update", (event) => this.#take(event, false));
    this.source.addEventListener("end", () => this.#end());
    this.source.addEventListener("error", () => this.#failed());
  }

  close() {
    this.source?.close();
    this.source = null;
  }

  #take(event, isFull) {
    this.latest = Date.now();
    this.ended = false;
    this.onFrame(JSON.parse(event.data), isFull);
    this.onLink("live", "live");
  }

  #end() {
    this.ended = true;
    this.onLink("stopped", "The service has stopped. This is its last state.");
  }

  #failed() {
    if (!this.ended) this.onLink("lost", "No connection to the service. This is its state of then; trying again.");
    if (this.source?.readyState === EventSource.CLOSED) {
      this.close();
      this.#ask();
    }
  }

  // A refused stream does not say why; a request does.
  async #ask() {
    const stop = new AbortController();
    try {
      const answer = await fetch("page/events", { signal: stop.signal });
      if (answer.status === 503) this.onLink("waiting", `The service refuses: ${(await answer.text()).trim()}; trying again.`);
      else if (answer.status === 401) this.onLink("lost", "The password has changed: load the page again.");
    } catch {
      // No connection, as is shown already.
    }
    stop.abort();
    setTimeout(() => this.source ?? this.open(), AGAIN_MS);
  }

  #check() {
    if (this.source && !this.ended && Date.now() - this.latest > SILENT_MS) {
      this.onLink("lost", "Nothing has come from the service for a while. This is its state of then.");
    }
  }

  #visibility() {
    clearTimeout(this.hiding);
    if (document.hidden) this.hiding = setTimeout(() => this.close(), HIDDEN_MS);
    else if (!this.source) this.open();
  }
}
