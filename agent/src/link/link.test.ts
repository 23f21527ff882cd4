import { describe, it } from "node:test";
import assert from "node:assert/strict";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createValidator } from "@bufbuild/protovalidate";
import { EnrollmentService } from "@clodei/proto/gen/clodei/v1/enrollment_service";
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import { AttemptPhase, NodeLinkService } from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import type { UploadLogsRequest } from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import { InstanceReason } from "@clodei/proto/gen/clodei/v1/instance";
import { ErrorInfoSchema } from "@clodei/proto/gen/google/rpc/error_details";
import { newId } from "@clodei/proto/ids";
import { Code, ConnectError } from "@connectrpc/connect";
import { pino } from "pino";
import { ContainerEngine } from "../containers/engine.ts";
import { IdentityStore } from "../identity/identity-store.ts";
import { StateFolder } from "../identity/state-folder.ts";
import { simulateGpus } from "../inventory/gpu.ts";
import { readHost } from "../inventory/host.ts";
import { Inventory } from "../inventory/inventory.ts";
import { Journal } from "../journal/journal.ts";
import { LogStore } from "../logs/log-store.ts";
import { TestAuthority } from "../testing/authority.ts";
import { listen } from "../testing/control-plane.ts";
import type { TestListener } from "../testing/control-plane.ts";
import { giveIdentity, Peers, sessionSecret } from "../testing/peer.ts";
import type { Peer } from "../testing/peer.ts";
import { readBootClock } from "../worker/boot-clock.ts";
import { Judge } from "../worker/judge.ts";
import { Worker } from "../worker/worker.ts";
import { jitterMs } from "./backoff.ts";
import { Link, waitAfter } from "./link.ts";
import type { LinkEnd } from "./link.ts";
import type { SessionEnd } from "./session.ts";

const instanceId = newId("ins");

interface Scene {
  readonly listener: TestListener;
  readonly authority: TestAuthority;
  readonly journal: Journal;
  readonly worker: Worker;
  readonly store: IdentityStore;
  readonly standings: string[];
  readonly uploads: UploadLogsRequest[][];
  readonly logs: LogStore;
  /** Ends the next log stream after its first message, as a control plane does whose reader left. */
  readonly breakUpload: () => void;
  /** Refuses renewals on the public listener as of a certificate that is superseded. */
  readonly refuseRenewals: () => void;
  /** How many of those were asked for. */
  readonly renewals: () => number;
  /** The next session that the agent opens. */
  readonly session: () => Promise<Peer>;
  readonly ended: Promise<LinkEnd>;
  readonly stop: () => void;
  readonly inventory: Inventory;
  /** What is wrong with the node's GPUs, by index. */
  readonly troubles: Map<number, string>;
}

async function withLink(
  work: (scene: Scene) => Promise<void>,
  life = { fromMs: Date.now() - 1000, toMs: Date.now() + 3_600_000 },
  maxVersion: "TLSv1.2" | "TLSv1.3" = "TLSv1.3",
): Promise<void> {
  const folder = await mkdtemp(join(tmpdir(), "clodei-link-"));
  const authority = await TestAuthority.create();
  const peers = new Peers();
  const uploads: UploadLogsRequest[][] = [];
  let breaksUpload = false;
  let refusesRenewals = false;
  let renewals = 0;
  const renew = async (certificateRequest: Uint8Array) => ({
    certificate: await authority.issueNode(certificateRequest, identity.nodeId, {
      fromMs: Date.now() - 1000,
      toMs: Date.now() + 3_600_000,
    }),
    trustBundle: [authority.rootDer],
    nodeEndpoint: `localhost:${listener.port}`,
  });
  await using publicListener = await listen({
    issued: await authority.issueServer([{ type: "dns", value: "localhost" }]),
    routes: (router) =>
      router.service(EnrollmentService, {
        createRenewalChallenge: () => ({ challenge: new Uint8Array(32) }),
        renewExpired: (request) => {
          renewals += 1;
          if (!refusesRenewals) return renew(request.certificateRequest);
          const info = { reason: "CERTIFICATE_INVALID", domain: "clodei.com" };
          throw new ConnectError("no", Code.Unauthenticated, undefined, [{ desc: ErrorInfoSchema, value: info }]);
        },
      }),
  });
  await using listener = await listen({
    issued: await authority.issueServer([{ type: "dns", value: "localhost" }]),
    clientCa: authority,
    maxVersion,
    routes: (router) =>
      router.service(NodeLinkService, {
        session: (requests, context) => peers.serve(requests, context),
        uploadLogs: async (requests) => {
          const got: UploadLogsRequest[] = [];
          uploads.push(got);
          for await (const request of requests) {
            got.push(request);
            if (!breaksUpload) continue;
            breaksUpload = false;
            throw new ConnectError("the reader left", Code.Canceled);
          }
          return {};
        },
        renewCertificate: (request) => renew(request.certificateRequest),
      }),
  });
  const state = await StateFolder.open(folder);
  const journal = Journal.open(state.paths.journal);
  const store = new IdentityStore(state.paths.identity);
  const identity = await giveIdentity(store, authority, { port: listener.port, url: publicListener.url }, life);
  const standings: string[] = [];
  const engine = new ContainerEngine({
    socketPath: join(folder, "no.sock"),
    nodeId: identity.nodeId,
    workspaceFolder: state.paths.workspaces,
    simulatedGpus: new Set(),
  });
  const troubles = new Map<number, string>();
  const model = { model: "H100-SXM", productName: "NVIDIA H100 80GB HBM3", memoryMib: 81559 };
  const inventory = await Inventory.open({
    readGpus: async () => [simulateGpus([model], identity.nodeId, troubles)],
    host: await readHost(),
    workspaceFolder: folder,
    dockerVersion: () => "",
  });
  const log = pino({ level: "silent" });
  const logs = new LogStore({ folder: state.paths.logs, engine });
  const clock = readBootClock();
  const validator = createValidator();
  const judge = new Judge({ validator, imageAllowlist: [], inventory: () => inventory.current() });
  const worker = new Worker({
    engine,
    logs,
    journal,
    judge,
    clock,
    paths: state.paths,
    minFreeMib: 0,
    usageIntervalMs: 1000,
    log,
  });
  const controller = new AbortController();
  const link = new Link({
    store,
    identity,
    worker,
    journal,
    inventory,
    validator,
    logs,
    log,
    agentVersion: "1",
    bootId: clock.bootId,
    onStanding: (standing) => void standings.push(standing),
    onWelcome: () => undefined,
  });
  const ended = link.run(controller.signal);
  try {
    await work({
      listener,
      authority,
      journal,
      worker,
      store,
      standings,
      uploads,
      logs,
      breakUpload: () => (breaksUpload = true),
      refuseRenewals: () => (refusesRenewals = true),
      renewals: () => renewals,
      session: () => peers.next(),
      ended,
      stop: () => controller.abort(),
      inventory,
      troubles,
    });
  } finally {
    controller.abort();
    await ended;
    journal[Symbol.dispose]();
    state[Symbol.dispose]();
    await rm(folder, { recursive: true });
  }
}

function report(journal: Journal, phase: AttemptPhase): void {
  journal.write({
    statuses: [
      { instanceId, attempt: 1, phase, reason: InstanceReason.UNSPECIFIED, message: "", imageDigest: "", imageId: "" },
    ],
  });
}

describe("the link", { timeout: 240_000 }, () => {
  it("opens with Hello over TLS 1.3 and a client certificate, and beats after Welcome", async () => {
    await withLink(async ({ session, journal, listener }) => {
      const peer = await session();
      const hello = await peer.hear("hello");
      assert.equal(hello.protocolVersion, 1);
      assert.equal(hello.journalId, journal.id);
      assert.equal(hello.sessionSecret.length, 0);
      assert.equal(hello.inventory?.gpus[0]?.simulated, true);
      peer.welcome(0n, 50);
      const [first, second] = [await peer.hear("heartbeat"), await peer.hear("heartbeat")];
      assert.deepEqual([first.sequence, second.sequence], [1n, 2n]);
      assert.equal(first.acceptingWork, false);
      assert.match(first.acceptingWorkMessage, /engine/);
      assert.equal(listener.clientSerials.length, 1);
    });
  });

  it("says at once, and not with the next beat, that the node takes work or why it does not", async () => {
    await withLink(async ({ session, worker }) => {
      const peer = await session();
      // The next beat is a minute away.
      peer.welcome(0n, 60_000);
      assert.match((await peer.hear("heartbeat")).acceptingWorkMessage, /was not asked yet/);
      const stop = new AbortController();
      const running = worker.run(stop.signal);
      assert.match((await peer.hear("heartbeat")).acceptingWorkMessage, /cannot be looked at/);
      stop.abort();
      await running;
    });
  });

  it("tells of a changed inventory at once, also of one that changed before Welcome, each time with a heartbeat behind it", async () => {
    await withLink(async ({ session, inventory, troubles }) => {
      const peer = await session();
      assert.equal((await peer.hear("hello")).inventory?.gpus[0]?.healthMessage, "");
      troubles.set(0, "GPU is lost");
      await inventory.refresh();
      peer.welcome(0n, 60_000);
      assert.equal((await peer.hear("inventory")).gpus[0]?.healthMessage, "GPU is lost");
      assert.equal((await peer.hear("heartbeat")).gpus[0]?.healthMessage, "GPU is lost");
      troubles.clear();
      await inventory.refresh();
      assert.equal((await peer.hear("inventory")).gpus[0]?.healthMessage, "");
      assert.equal((await peer.hear("heartbeat")).gpus[0]?.healthMessage, "");
    });
  });

  it("sends reports in order, keeps them until they are acknowledged, and again after a reconnect", async () => {
    await withLink(async ({ session, journal, listener }) => {
      report(journal, AttemptPhase.CREATING);
      const peer = await session();
      peer.welcome();
      assert.equal((await peer.hear("statusReport")).sequence, 1n);
      report(journal, AttemptPhase.RUNNING);
      assert.equal((await peer.hear("statusReport")).sequence, 2n);
      peer.say({ case: "ack", value: { sequence: 1n } });
      while (journal.acknowledged < 1n) await new Promise((resolve) => setTimeout(resolve, 5));
      listener.cut();
      const next = await session();
      const hello = await next.hear("hello");
      assert.deepEqual(
        [...hello.sessionSecret],
        [...sessionSecret],
        "the reconnect shows the secret of the last Welcome",
      );
      assert.equal(hello.journalSequence, 2n);
      next.welcome(1n);
      const again = await next.hear("statusReport");
      assert.deepEqual(
        again.statuses.map(({ sequence, phase }) => [sequence, phase]),
        [[2n, AttemptPhase.RUNNING]],
      );
      next.goodbye(ErrorReason.UNAVAILABLE);
      const third = await session();
      third.welcome(2n);
      await third.hear("heartbeat");
      assert.equal(journal.pendingCount(), 0);
    });
  });

  it("answers a probe and ignores a desired set that is older than the last", async () => {
    await withLink(async ({ session, worker }) => {
      const peer = await session();
      peer.welcome();
      for (const generation of [5n, 3n]) {
        peer.say({ case: "desiredSet", value: { generation } });
      }
      peer.say({ case: "probe", value: { nonce: new Uint8Array([9]) } });
      assert.deepEqual([...(await peer.hear("probeReply")).nonce], [9]);
      assert.equal(worker.observedGeneration, 5n);
    });
  });

  it("takes a restored control plane's older set at the beginning of a session, and in the session only newer ones", async () => {
    await withLink(async ({ session, worker }) => {
      const say = async (peer: Peer, generation: bigint): Promise<void> => {
        peer.say({ case: "desiredSet", value: { generation } });
        peer.say({ case: "probe", value: { nonce: new Uint8Array([1]) } });
        await peer.hear("probeReply");
      };
      const peer = await session();
      peer.welcome();
      await say(peer, 100n);
      peer.goodbye(ErrorReason.UNAVAILABLE);
      const restored = await session();
      assert.equal((await restored.hear("hello")).observedGeneration, 100n);
      restored.welcome();
      await say(restored, 40n);
      assert.equal(worker.observedGeneration, 40n);
      await say(restored, 39n);
      assert.equal(worker.observedGeneration, 40n);
      await say(restored, 41n);
      assert.equal(worker.observedGeneration, 41n);
    });
  });

  it("refuses a set whose generation is absurdly far ahead, tells it, and takes the next good one", async () => {
    await withLink(async ({ session, worker }) => {
      for (const generation of [2n ** 64n - 1n, 2n ** 32n + 1n]) {
        const forged = await session();
        forged.welcome();
        forged.say({ case: "desiredSet", value: { generation } });
        await assert.rejects(forged.hear("probeReply"), "the session ends");
        const told = await session();
        assert.equal((await told.hear("hello")).observedGeneration, 0n);
        told.welcome();
        assert.match((await told.hear("heartbeat")).acceptingWorkMessage, /generation: .* is too far ahead/);
        told.goodbye(ErrorReason.UNAVAILABLE);
      }
      const good = await session();
      good.welcome();
      good.say({ case: "desiredSet", value: { generation: 2n ** 32n } });
      good.say({ case: "probe", value: { nonce: new Uint8Array([1]) } });
      await good.hear("probeReply");
      assert.equal(worker.observedGeneration, 2n ** 32n);
      assert.doesNotMatch(worker.acceptance().message, /too far ahead/);
    });
  });

  it("begins a new journal when the control plane knows more of it than it holds", async () => {
    await withLink(async ({ session, journal }) => {
      report(journal, AttemptPhase.CREATING);
      const id = journal.id;
      const peer = await session();
      peer.welcome(50n);
      const next = await session();
      const hello = await next.hear("hello");
      assert.notEqual(hello.journalId, id);
      next.welcome(0n);
      assert.equal((await next.hear("statusReport")).sequence, 1n);
    });
  });

  it("ends when another process took its session over", async () => {
    await withLink(async ({ session, ended }) => {
      const peer = await session();
      peer.welcome();
      peer.goodbye(ErrorReason.SESSION_REPLACED);
      assert.equal(await ended, "replaced");
    });
  });

  it("ends for good when the node was revoked, and says so", async () => {
    await withLink(async ({ session, ended, standings }) => {
      (await session()).goodbye(ErrorReason.NODE_REVOKED);
      assert.equal(await ended, "revoked");
      assert.deepEqual(standings, ["revoked"]);
    });
  });

  it("waits in quarantine without a storm of reconnects", async () => {
    await withLink(async ({ session, standings, listener }) => {
      (await session()).goodbye(ErrorReason.NODE_QUARANTINED);
      await new Promise((resolve) => setTimeout(resolve, 500));
      assert.deepEqual(standings, ["quarantined"]);
      assert.equal(listener.requests(), 1);
    });
  });

  it("refuses logs that it does not hold", async () => {
    await withLink(async ({ session, uploads }) => {
      const peer = await session();
      peer.welcome();
      peer.say({ case: "openLogs", value: { streamId: "one", attempt: { instanceId, attempt: 1 }, follow: true } });
      const refused = await peer.hear("logsRefused");
      assert.equal(refused.streamId, "one");
      assert.equal(uploads.length, 0);
    });
  });

  it("opens a log stream again that the control plane ended while nothing was written", async () => {
    await withLink(async ({ session, uploads, logs, breakUpload }) => {
      await logs.expect({ instanceId, attempt: 1 });
      const peer = await session();
      peer.welcome();
      const open = { streamId: "one", attempt: { instanceId, attempt: 1 }, follow: true };
      breakUpload();
      peer.say({ case: "openLogs", value: open });
      while (uploads.length < 1) await new Promise((resolve) => setTimeout(resolve, 5));
      await new Promise((resolve) => setTimeout(resolve, 300));
      peer.say({ case: "openLogs", value: open });
      const deadlineMs = performance.now() + 5000;
      while (uploads.length < 2) {
        assert.ok(performance.now() < deadlineMs, "the first stream still holds its place");
        await new Promise((resolve) => setTimeout(resolve, 5));
      }
    });
  });

  it("renews at half of the certificate's life and uses the new certificate at once", async () => {
    const nowMs = Date.now();
    await withLink(
      async ({ session, listener, store }) => {
        const peer = await session();
        peer.welcome();
        const next = await session();
        assert.deepEqual([...(await next.hear("hello")).sessionSecret], [...sessionSecret]);
        assert.equal(new Set(listener.clientSerials).size, 2);
        const loaded = await store.load();
        assert.equal(loaded?.certificate.serialNumber, listener.clientSerials.at(-1));
      },
      { fromMs: nowMs - 600_000, toMs: nowMs + 300_000 },
    );
  });

  it("renews at once a certificate that has run out by the control plane's clock alone", async () => {
    await withLink(async ({ session, listener }) => {
      (await session()).goodbye(ErrorReason.CERTIFICATE_INVALID);
      await (await session()).hear("hello");
      assert.equal(new Set(listener.clientSerials).size, 2);
    });
  });

  it("waits for an operator where the control plane does not renew it either", async () => {
    await withLink(async ({ session, listener, refuseRenewals, renewals }) => {
      refuseRenewals();
      (await session()).goodbye(ErrorReason.CERTIFICATE_INVALID);
      while (renewals() === 0) await new Promise((resolve) => setTimeout(resolve, 5));
      await new Promise((resolve) => setTimeout(resolve, 500));
      assert.deepEqual([listener.requests(), renewals()], [1, 1]);
    });
  });

  it("speaks to no listener below TLS 1.3", async () => {
    await withLink(
      async ({ listener }) => {
        await new Promise((resolve) => setTimeout(resolve, 700));
        assert.equal(listener.requests(), 0);
      },
      undefined,
      "TLSv1.2",
    );
  });
});

describe("waits", () => {
  const ended = (reason?: ErrorReason, reconnectWithinMs?: number): SessionEnd => ({
    welcomed: true,
    reason,
    message: "",
    reconnectWithinMs,
  });
  const longest = (end: SessionEnd, failures: number): number => waitAfter(end, failures, () => 1);

  it("leave a node that finds nobody 2 of the 5 seconds in which its status is right again, however long the outage", () => {
    for (let failures = 1; failures <= 10_000; failures++) {
      assert.ok(longest(ended(), failures) <= 3_000, `after ${failures} failures`);
      assert.equal(
        waitAfter(ended(), failures, () => 0),
        0,
        "spread over the whole span",
      );
    }
    assert.deepEqual([longest(ended(), 1), longest(ended(), 2)], [250, 500]);
  });

  it("are longer where the control plane refuses, and as long as it says up to a bound", () => {
    assert.equal(longest(ended(ErrorReason.RATE_LIMITED), 100), 10_000);
    assert.equal(longest(ended(ErrorReason.UNAVAILABLE, 5_000), 100), 5_000);
    assert.equal(longest(ended(ErrorReason.UNAVAILABLE, 3_600_000), 1), 100_000);
    assert.equal(longest(ended(ErrorReason.UNAVAILABLE, -1), 1), 0);
  });

  it("between heartbeats drift apart", () => {
    assert.equal(
      jitterMs(10_000, () => 0),
      9000,
    );
    assert.equal(Math.round(jitterMs(10_000, () => 1)), 11_000);
  });
});
