import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import { Registry } from "prom-client";
import { NodesService } from "../nodes/service.ts";
import type { Database } from "../platform/database.ts";
import { CertificateGate, type Peer } from "./certificate-gate.ts";
import { dispatchLimits } from "./limits.ts";
import { type NodeIdentity, TestFleet } from "./test-fleet.ts";

describe("the gate of certificates", () => {
  let fleet: TestFleet;
  before(async () => {
    fleet = await TestFleet.start();
  });
  after(() => fleet?.[Symbol.asyncDispose]());

  function peerOf({ certificatePem }: NodeIdentity): Peer {
    const der = Buffer.from(certificatePem.replaceAll(/-----.*?-----|\s/g, ""), "base64");
    const issued = fleet.authority.issued(der);
    assert.ok(issued);
    const { nodeId, serial, notAfter } = issued;
    return { nodeId, certificateSerial: serial, certificateExpireTime: notAfter, address: "127.0.0.1:1" };
  }

  /** A gate, and how often it asked the database. `hold`, once given, keeps its next question from going out. */
  function startGate(): { gate: CertificateGate; looks: () => number; hold: (until: Promise<void>) => void } {
    const { database: real, wakeups, log } = fleet.db;
    let looks = 0;
    let held: Promise<void> = Promise.resolve();
    const database: Pick<Database, "look"> = {
      async look(work) {
        looks += 1;
        await held;
        return real.look(work);
      },
    };
    const hold = (until: Promise<void>): void => {
      held = until;
    };
    const { clock } = fleet;
    const enrollment = fleet.enrollment;
    const nodes = new NodesService({ enrollment, clock, wakeups, log, registry: new Registry(), leaseMs: 3_000 });
    const gate = new CertificateGate({ database, nodes, clock, limits: dispatchLimits });
    return { gate, looks: () => looks, hold };
  }

  test("questions of one moment are one question, and each gets its own answer", async () => {
    const identities = await Promise.all(Array.from({ length: 6 }, () => fleet.enroll()));
    const [revoked] = identities;
    assert.ok(revoked);
    await fleet.revoke(revoked.nodeId);
    const { gate, looks } = startGate();
    const peers = identities.map(peerOf);
    const refusals = await Promise.all([...peers, ...peers, ...peers].map((peer) => gate.refusal(peer)));
    assert.equal(looks(), 1);
    for (const [index, refusal] of refusals.entries()) {
      const expected = index % peers.length === 0 ? ErrorReason.NODE_REVOKED : undefined;
      assert.equal(refusal?.reason, expected);
    }
  });

  test("invariant 11: who asks while a question is under way gets no answer that is older than his own", async () => {
    const identity = await fleet.enroll();
    const { gate, looks, hold } = startGate();
    const release = Promise.withResolvers<void>();
    assert.equal(await gate.refusal(peerOf(await fleet.enroll())), undefined);
    hold(release.promise);
    const early = gate.refusal(peerOf(await fleet.enroll()));
    while (looks() < 2) await new Promise((resolve) => setImmediate(resolve));
    await fleet.revoke(identity.nodeId);
    const late = gate.refusal(peerOf(identity));
    release.resolve();
    assert.equal(await early, undefined);
    assert.equal((await late)?.reason, ErrorReason.NODE_REVOKED);
    assert.equal(looks(), 3);
  });

  test("a question that fails fails for those who asked, and for nobody after them", async () => {
    const { gate, hold } = startGate();
    const peer = peerOf(await fleet.enroll());
    const failure = Promise.withResolvers<void>();
    hold(failure.promise);
    failure.reject(new Error("away"));
    await assert.rejects(Promise.all([gate.refusal(peer), gate.refusal(peer)]), /^Error: away$/);
    hold(Promise.resolve());
    assert.equal(await gate.refusal(peer), undefined);
  });
});
