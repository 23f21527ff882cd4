import { describe, it } from "node:test";
import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { randomBytes } from "node:crypto";
import { access, mkdir, mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { promisify } from "node:util";
import { EnrollmentService } from "@clodei/proto/gen/clodei/v1/enrollment_service";
import { formatEnrollmentToken } from "@clodei/proto/enrollment-token";
import { newId, type NodeId } from "@clodei/proto/ids";
import { pino } from "pino";
import { readCommand } from "./config.ts";
import { IdentityStore } from "./identity/identity-store.ts";
import { StateFolder, statePaths } from "./identity/state-folder.ts";
import { Journal } from "./journal/journal.ts";
import { runAgent } from "./run.ts";
import { TestAuthority } from "./testing/authority.ts";
import { listen } from "./testing/control-plane.ts";

const program = new URL("./main.ts", import.meta.url).pathname;
const hourMs = 3_600_000;

interface Scene {
  readonly folder: string;
  readonly requests: () => number;
  /** Runs `clodei-agent enroll` with a token that makes the machine this node. Returns what it said when it failed. */
  readonly enroll: (nodeId: NodeId) => Promise<string | undefined>;
}

async function withFolder(work: (scene: Scene) => Promise<void>): Promise<void> {
  const authority = await TestAuthority.create();
  const nodes = new Map<string, NodeId>();
  await using listener = await listen({
    issued: await authority.issueServer([{ type: "dns", value: "localhost" }]),
    routes: (router) =>
      router.service(EnrollmentService, {
        enroll: async ({ enrollmentToken, certificateRequest }) => {
          const nodeId = nodes.get(enrollmentToken) ?? newId("nod");
          const life = { fromMs: Date.now() - 1000, toMs: Date.now() + hourMs };
          const certificate = await authority.issueNode(certificateRequest, nodeId, life);
          return {
            nodeId,
            nodeName: "node",
            certificate,
            trustBundle: [authority.rootDer],
            nodeEndpoint: "localhost:1",
          };
        },
      }),
  });
  const parent = await mkdtemp(join(tmpdir(), "clodei-owner-"));
  const folder = join(parent, "state");
  const enroll = async (nodeId: NodeId): Promise<string | undefined> => {
    const secret = randomBytes(32).toString("base64url");
    const token = formatEnrollmentToken({ caDigestHex: authority.digestHex, id: newId("ent"), secret });
    nodes.set(token, nodeId);
    const args = [program, "enroll", "--state", folder, "--control-plane", listener.url];
    const env = { PATH: process.env["PATH"] ?? "", CLODEI_ENROLLMENT_TOKEN: token };
    return await promisify(execFile)(process.execPath, args, { env }).then(
      () => undefined,
      (error: unknown) => (error as { readonly stderr: string }).stderr,
    );
  };
  try {
    await work({ folder, requests: listener.requests, enroll });
  } finally {
    await rm(parent, { recursive: true });
  }
}

/** The work of a node that ran here: its journal, and a customer's file. Returns the file's path. */
async function leaveWork(folder: string, nodeId: NodeId | undefined): Promise<string> {
  using state = await StateFolder.open(folder);
  if (nodeId !== undefined) {
    using journal = Journal.open(state.paths.journal);
    journal.saveNodeId(nodeId);
  }
  const workspace = join(state.paths.workspaces, newId("ins"));
  await mkdir(workspace);
  await writeFile(join(workspace, "file"), "a customer's");
  return join(workspace, "file");
}

async function nodeOf(folder: string): Promise<NodeId | undefined> {
  return (await new IdentityStore(statePaths(folder).identity).load())?.nodeId;
}

async function run(folder: string, signal = AbortSignal.timeout(30_000)): Promise<unknown> {
  const command = readCommand(["run", "--state", folder, "--docker-socket", join(folder, "no.sock")], {});
  assert.ok(command.kind === "run");
  return await runAgent({
    config: command.config,
    agentVersion: "1",
    log: pino({ level: "silent" }),
    signal,
  });
}

describe("a state folder is one node's", { timeout: 60_000 }, () => {
  it("enrolls its node again, with all that is in it", async () => {
    await withFolder(async ({ folder, enroll }) => {
      const nodeId = newId("nod");
      assert.equal(await enroll(nodeId), undefined);
      const file = await leaveWork(folder, nodeId);
      assert.equal(await enroll(nodeId), undefined);
      assert.equal(await nodeOf(folder), nodeId);
      assert.equal(await run(folder, AbortSignal.timeout(300)), "stopped");
      assert.equal(await readFile(file, "utf8"), "a customer's");
      // The identity is lost, and the journal still tells whose folder this is.
      await rm(statePaths(folder).identity, { recursive: true });
      assert.match((await enroll(newId("nod"))) ?? "", new RegExp(`is the state folder of node ${nodeId}`));
      assert.equal(await nodeOf(folder), undefined);
      assert.equal(await enroll(nodeId), undefined);
      assert.equal(await nodeOf(folder), nodeId);
    });
  });

  it("is not enrolled as another node, says what to do, and changes nothing", async () => {
    await withFolder(async ({ folder, enroll }) => {
      const [old, other] = [newId("nod"), newId("nod")];
      assert.equal(await enroll(old), undefined);
      const before = await readFile(join(statePaths(folder).identity, "node.json"), "utf8");
      const refusal = (await enroll(other)) ?? "";
      assert.match(refusal, new RegExp(`is the state folder of node ${old}.*Use an empty --state folder for ${other}`));
      assert.match(refusal, new RegExp(`revoke ${other}`));
      assert.equal(await readFile(join(statePaths(folder).identity, "node.json"), "utf8"), before);
      // The key that was certified for the other node is never this one's.
      await assert.rejects(access(join(statePaths(folder).identity, "key.next.pem")));
      assert.equal(await enroll(old), undefined);
    });
  });

  it("spends no token where nothing tells whose workspaces it holds", async () => {
    await withFolder(async ({ folder, requests, enroll }) => {
      const file = await leaveWork(folder, undefined);
      assert.match((await enroll(newId("nod"))) ?? "", /nothing in .* tells of which node/);
      assert.equal(requests(), 0);
      assert.equal(await readFile(file, "utf8"), "a customer's");
    });
  });

  it("is not run with another node's identity, and loses nothing", async () => {
    await withFolder(async ({ folder, enroll }) => {
      const [old, other] = [newId("nod"), newId("nod")];
      assert.equal(await enroll(other), undefined);
      const file = await leaveWork(folder, old);
      await assert.rejects(run(folder), new RegExp(`is the state folder of node ${old}, and ${other} must not use it`));
      assert.equal(await readFile(file, "utf8"), "a customer's");
      using journal = Journal.open(statePaths(folder).journal);
      assert.equal(journal.nodeId(), old);
    });
  });
});
