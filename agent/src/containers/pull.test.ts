import assert from "node:assert/strict";
import { randomBytes } from "node:crypto";
import { writeFile } from "node:fs/promises";
import { join } from "node:path";
import { after, before, describe, it } from "node:test";
import { PullPolicy } from "@clodei/proto/gen/clodei/v1/instance";
import { newId } from "@clodei/proto/ids";
import { registryUnavailable, startTestEngine } from "../../../test/harness/engine.ts";
import { startRegistry, type TestRegistry } from "../../../test/harness/registry.ts";
import { callEngine } from "../../../tools/engine/api.ts";
import { importBusybox } from "../../../tools/engine/busybox.ts";
import type { PrivateEngine } from "../../../tools/engine/private-engine.ts";
import { EngineError, type EngineErrorKind } from "./engine-error.ts";
import { ContainerEngine } from "./engine.ts";
import type { PullBytes } from "./pull-progress.ts";
import { RegistryAuth } from "./registry-auth.ts";

const signal = new AbortController().signal;
const layerBytes = 20_000_000;

describe("pulls from a real registry", { skip: registryUnavailable }, () => {
  let engine: PrivateEngine;
  let open: TestRegistry;
  let closed: TestRegistry;
  let openImage: string;
  let closedImage: string;
  const credentials = { username: "node", password: "colon:and space" };

  before(async () => {
    engine = await startTestEngine();
    open = await startRegistry(engine);
    closed = await startRegistry(engine, { port: 5001, credentials });
    openImage = await push(open, "team/open");
    closedImage = await push(closed, "team/closed");
  });
  after(async () => engine.close());

  async function push(registry: TestRegistry, name: string): Promise<string> {
    // Bytes that compress to nothing less, and differ from each other image's.
    const files = [{ path: "payload", kind: "file", data: randomBytes(layerBytes) } as const];
    await importBusybox(engine.socketPath, "local/new:1", { files });
    return registry.push("local/new:1", name);
  }

  async function make(authFile?: string): Promise<ContainerEngine> {
    return new ContainerEngine({
      socketPath: engine.socketPath,
      nodeId: newId("nod"),
      workspaceFolder: join(engine.folder, "workspaces"),
      simulatedGpus: new Set(),
      registryAuth: authFile === undefined ? undefined : new RegistryAuth(authFile),
    });
  }

  async function authFile(content: unknown): Promise<string> {
    const path = join(engine.folder, "config.json");
    await writeFile(path, JSON.stringify(content));
    return path;
  }

  const auth = (password: string) => ({
    auths: {
      [`http://${closed.host}/v2/`]: { auth: Buffer.from(`${credentials.username}:${password}`).toString("base64") },
    },
  });

  const drop = (image: string): Promise<string> =>
    callEngine(engine.socketPath, { method: "DELETE", path: `/images/${image}` });

  async function failure(image: string, authPath?: string): Promise<{ kind: EngineErrorKind; message: string }> {
    const containers = await make(authPath);
    const error: unknown = await containers
      .ensureImage(image, PullPolicy.ALWAYS, () => {}, signal)
      .then(
        () => assert.fail("the pull succeeds"),
        (reason: unknown) => reason,
      );
    assert.ok(error instanceof EngineError, String(error));
    return { kind: error.kind, message: error.message };
  }

  it("tells progress in bytes that only grow, and digest and id at the end", async () => {
    const seen: PullBytes[] = [];
    const containers = await make();
    const image = await containers.ensureImage(
      openImage,
      PullPolicy.IF_NOT_PRESENT,
      (bytes) => seen.push(bytes),
      signal,
    );
    assert.match(image.imageId, /^sha256:[0-9a-f]{64}$/);
    assert.match(image.digest ?? "", /^sha256:[0-9a-f]{64}$/);
    assert.notEqual(image.digest, image.imageId);
    const last = seen.at(-1) ?? assert.fail("progress is told");
    assert.equal(last.bytesDone, last.bytesTotal);
    assert.ok(last.bytesTotal >= layerBytes, `${last.bytesTotal}`);
    for (const [index, bytes] of seen.entries()) {
      assert.ok(bytes.bytesDone <= bytes.bytesTotal);
      assert.ok(bytes.bytesDone >= (seen[index - 1]?.bytesDone ?? 0));
    }
    // What is there is not pulled again, and its digest is still known.
    const again: PullBytes[] = [];
    const present = await containers.ensureImage(
      openImage,
      PullPolicy.IF_NOT_PRESENT,
      (bytes) => again.push(bytes),
      signal,
    );
    assert.deepEqual([present, again], [image, []]);
    await drop(openImage);
    const repository = openImage.slice(0, openImage.lastIndexOf(":"));
    const pinned = await containers.ensureImage(
      `${repository}@${image.digest}`,
      PullPolicy.IF_NOT_PRESENT,
      () => {},
      signal,
    );
    assert.deepEqual(pinned, image);
  });

  it("pulls a tag again with ALWAYS, and not with IF_NOT_PRESENT", async () => {
    const containers = await make();
    const pull = (policy: PullPolicy) =>
      containers.ensureImage(`${open.host}/team/moving:latest`, policy, () => {}, signal);
    await push(open, "team/moving");
    const first = await pull(PullPolicy.ALWAYS);
    await importBusybox(engine.socketPath, "local/new:2");
    // Pushed without taking the node's own copy of the tag along.
    await callEngine(engine.socketPath, {
      method: "POST",
      path: `/images/${first.imageId}/tag`,
      query: { repo: "keep", tag: "1" },
    });
    await open.push("local/new:2", "team/moving");
    await callEngine(engine.socketPath, {
      method: "POST",
      path: `/images/${first.imageId}/tag`,
      query: { repo: `${open.host}/team/moving`, tag: "latest" },
    });
    assert.equal((await pull(PullPolicy.IF_NOT_PRESENT)).imageId, first.imageId);
    const second = await pull(PullPolicy.ALWAYS);
    assert.notEqual(second.imageId, first.imageId);
    assert.notEqual(second.digest, first.digest);
  });

  it("pulls with the credentials of a Docker config.json, read anew for each pull", async () => {
    const path = await authFile(auth("wrong"));
    const containers = await make(path);
    assert.equal((await failure(closedImage, path)).kind, "unauthorized");
    await authFile(auth(credentials.password));
    const image = await containers.ensureImage(closedImage, PullPolicy.ALWAYS, () => {}, signal);
    assert.match(image.digest ?? "", /^sha256:/);
  });

  it("tells an image that is not there from credentials that are refused and from a registry that is away", async () => {
    assert.equal((await failure(`${open.host}/team/none:latest`)).kind, "image_not_found");
    assert.deepEqual(await failure(`${open.host}/team/open:none`), {
      kind: "image_not_found",
      message: `${open.host} has no image team/open:none`,
    });
    const digest = `sha256:${"0".repeat(64)}`;
    assert.equal((await failure(`${open.host}/team/open@${digest}`)).kind, "image_not_found");
    const refused = await failure(closedImage);
    assert.equal(refused.kind, "unauthorized");
    for (const host of ["127.0.0.1:5999", "registry.invalid"]) {
      // In our words: Docker's name this node's addresses and resolver.
      assert.deepEqual(await failure(`${host}/team/open:latest`), {
        kind: "unreachable",
        message: `team/open:latest could not be pulled from ${host}: the node cannot reach the registry`,
      });
    }
    const helper = await failure(closedImage, await authFile({ credsStore: "program" }));
    assert.equal(helper.kind, "unauthorized");
    for (const { message } of [refused, helper]) assert.ok(!message.includes(credentials.password));
  });

  it("gives up a pull when its signal is aborted", async () => {
    const image = await push(open, "team/slow");
    const containers = await make();
    const stop = new AbortController();
    const pulling = containers.ensureImage(
      image,
      PullPolicy.ALWAYS,
      ({ bytesDone }) => bytesDone > 0 && stop.abort(new Error("enough")),
      stop.signal,
    );
    await assert.rejects(pulling, /enough/);
  });

  it("fails as away, and not as a bad image, when the engine dies in the middle", async () => {
    const image = await push(open, "team/dying");
    const containers = await make();
    let killed: Promise<void> | undefined;
    const kill = ({ bytesDone }: PullBytes): void => {
      if (bytesDone > 0) killed ??= engine.kill();
    };
    const pulling = containers.ensureImage(image, PullPolicy.ALWAYS, kill, signal);
    await assert.rejects(pulling, (error: unknown) => error instanceof EngineError && error.kind === "away");
    await killed;
    await engine.startDaemon();
    assert.match((await containers.ensureImage(image, PullPolicy.ALWAYS, () => {}, signal)).digest ?? "", /^sha256:/);
  });
});
