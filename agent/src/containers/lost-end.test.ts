import assert from "node:assert/strict";
import { describe, it } from "node:test";
import { isEndLost } from "./lost-end.ts";

describe("the end of a container", () => {
  const start = new Date("2026-01-01T12:00:00Z");
  const after = (ms: number) => new Date(start.getTime() + ms);
  const lost = (exitCode: number, ms: number | undefined) =>
    isEndLost(exitCode, ms === undefined ? undefined : after(ms), () => [new Date(0), start]);

  it("is lost where the engine made it up while it came back", () => {
    assert.equal(lost(255, 400), true);
  });

  it("is what the engine says at every other time and with every other code", () => {
    assert.equal(lost(255, -5000), false);
    assert.equal(lost(255, 60_000), false);
    assert.equal(lost(0, 400), false);
    assert.equal(lost(137, 400), false);
    assert.equal(lost(255, undefined), false);
  });
});
