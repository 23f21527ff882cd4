import assert from "node:assert/strict";
import { randomBytes } from "node:crypto";
import { describe, test } from "node:test";
import { newId } from "@clodei/proto/ids";
import fc from "fast-check";
import { challengeLifetimeMs, checkChallenge, createChallenge } from "./challenges.ts";
import { certificateFault, defaultNodeName, isTokenAlive, takesNewWork, type NodeState } from "./model.ts";

const now = new Date("2026-11-22T12:00:00Z");
const at = (ms: number): Date => new Date(now.getTime() + ms);

describe("challenges", () => {
  test("are good for their node until their end, to the millisecond", () => {
    const [secret, nodeId] = [randomBytes(32), newId("nod")];
    const { challenge, expireTime } = createChallenge(secret, nodeId, now);
    assert.deepEqual(expireTime, at(challengeLifetimeMs));
    assert.deepEqual(checkChallenge(secret, nodeId, challenge, at(challengeLifetimeMs - 1)), expireTime);
    assert.equal(checkChallenge(secret, nodeId, challenge, at(challengeLifetimeMs)), undefined);
    assert.equal(checkChallenge(secret, newId("nod"), challenge, now), undefined);
    assert.equal(checkChallenge(randomBytes(32), nodeId, challenge, now), undefined);
  });

  test("with any bit changed, and of any other length, are none", () => {
    const [secret, nodeId] = [randomBytes(32), newId("nod")];
    const { challenge } = createChallenge(secret, nodeId, now);
    for (let bit = 0; bit < challenge.length * 8; bit += 1) {
      const changed = new Uint8Array(challenge);
      changed[bit >> 3] = (changed[bit >> 3] ?? 0) ^ (1 << (bit & 7));
      assert.equal(checkChallenge(secret, nodeId, changed, now), undefined);
    }
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 64 }), (bytes) => {
        assert.equal(checkChallenge(secret, nodeId, bytes, now), undefined);
      }),
    );
  });

  test("of one node in one millisecond are all different", () => {
    const [secret, nodeId] = [randomBytes(32), newId("nod")];
    const texts = Array.from({ length: 1000 }, () => {
      return Buffer.from(createChallenge(secret, nodeId, now).challenge).toString("hex");
    });
    assert.equal(new Set(texts).size, texts.length);
  });
});

describe("names of nodes", () => {
  test("that are made keep to the rule of names, whatever the datacenter is called", () => {
    const datacenter = fc.stringMatching(/^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$/);
    fc.assert(
      fc.property(datacenter, (name) => {
        const location = { country: "ES", region: "madrid", datacenter: name, tier: 4 };
        assert.match(defaultNodeName(location, newId("nod")), /^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$/);
      }),
    );
  });
});

describe("rules", () => {
  test("a certificate is good while it is active and has not ended", () => {
    const expireTime = at(1000);
    assert.equal(certificateFault({ state: "active", expireTime }, at(999)), undefined);
    assert.equal(certificateFault({ state: "active", expireTime }, at(1000)), "expired");
    assert.equal(certificateFault({ state: "superseded", expireTime }, now), "superseded");
    assert.equal(certificateFault({ state: "ended", expireTime }, at(2000)), "ended");
  });

  test("a token is alive until it ends or is revoked", () => {
    assert.equal(isTokenAlive({ expireTime: at(1), revokeTime: undefined }, now), true);
    assert.equal(isTokenAlive({ expireTime: now, revokeTime: undefined }, now), false);
    assert.equal(isTokenAlive({ expireTime: at(1), revokeTime: now }, now), false);
  });

  test("only a node that is ready, connected, not cordoned, and willing takes new work", () => {
    const able = { state: "ready", connected: true, cordoned: false, acceptingWork: true } as const;
    assert.ok(takesNewWork(able));
    const states: NodeState[] = ["enrolled", "unreachable", "quarantined", "revoked"];
    for (const state of states) assert.ok(!takesNewWork({ ...able, state }), state);
    assert.ok(!takesNewWork({ ...able, connected: false }));
    assert.ok(!takesNewWork({ ...able, cordoned: true }));
    assert.ok(!takesNewWork({ ...able, acceptingWork: false }));
  });
});
