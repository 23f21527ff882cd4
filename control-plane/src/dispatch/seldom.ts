// What a log is told once and not at every try, while nobody mends it.

/** Says yes to the first, and then not again for a while. */
export class Seldom {
  readonly #everyMs: number;
  #lastMs = Number.NEGATIVE_INFINITY;

  constructor(everyMs: number) {
    this.#everyMs = everyMs;
  }

  /** Whether it is time to say it (again). */
  isDue(): boolean {
    const nowMs = performance.now();
    if (nowMs - this.#lastMs < this.#everyMs) return false;
    this.#lastMs = nowMs;
    return true;
  }
}
