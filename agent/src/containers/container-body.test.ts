import assert from "node:assert/strict";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, it } from "node:test";
import { create, type MessageInitShape } from "@bufbuild/protobuf";
import { ContainerSpecSchema } from "@clodei/proto/gen/clodei/node/v1/node_link_service";
import { newId } from "@clodei/proto/ids";
import { type ContainerSettings, containerBody, networkBody } from "./container-body.ts";
import { firstFileOfTar, resolveImageUser } from "./image-user.ts";
import { RegistryAuth, RegistryAuthError } from "./registry-auth.ts";

const settings: ContainerSettings = {
  nodeId: newId("nod"),
  simulatedGpus: new Set(["GPU-SIM-1", "GPU-SIM-2"]),
  dnsServers: ["10.0.0.1"],
  pidsLimit: 1,
  openFilesLimit: 1,
};
const key = { instanceId: newId("ins"), attempt: 1 };

const body = (
  spec: Omit<MessageInitShape<typeof ContainerSpecSchema>, "$typeName">,
  generation = 1n,
  network = "clodei-0",
) =>
  containerBody(
    settings,
    key,
    generation,
    create(ContainerSpecSchema, { cpuMillis: 1000, memoryMib: 64, ...spec }),
    "sha256:1",
    "/w",
    network,
  );

describe("what Docker is asked for", () => {
  it("names exactly the real GPUs of an instance, in the request and to NVIDIA's runtime", () => {
    const real = body({ gpuUuids: ["GPU-a", "GPU-SIM-1", "GPU-b"] });
    assert.deepEqual(real.HostConfig?.DeviceRequests, [
      { Driver: "nvidia", DeviceIDs: ["GPU-a", "GPU-b"], Capabilities: [["gpu", "compute", "utility"]] },
    ]);
    assert.deepEqual(real.Env, ["NVIDIA_VISIBLE_DEVICES=GPU-a,GPU-b"]);
  });

  it("leaves out the device request, and nothing else, for simulated GPUs", () => {
    const { Labels: labels, ...simulated } = body({ gpuUuids: ["GPU-SIM-1", "GPU-SIM-2"] });
    const { Labels: noLabels, ...none } = body({});
    assert.deepEqual(simulated, none);
    assert.deepEqual(labels, noLabels);
    const real = body({ gpuUuids: ["GPU-a"] });
    const { DeviceRequests: requests, ...host } = real.HostConfig ?? {};
    assert.equal(requests?.length, 1);
    assert.deepEqual(host, simulated.HostConfig);
    assert.deepEqual(simulated.Env, ["NVIDIA_VISIBLE_DEVICES=void"]);
  });

  it("cannot be told another device by a variable of the specification or of the image", () => {
    const forged = body({ env: { NVIDIA_VISIBLE_DEVICES: "all" } });
    // The last of two entries is the one that counts.
    assert.deepEqual(forged.Env?.at(-1), "NVIDIA_VISIBLE_DEVICES=void");
  });

  it("keeps the image's command only where none is given", () => {
    const pick = ({ Entrypoint, Cmd }: ReturnType<typeof body>) => [Entrypoint, Cmd];
    assert.deepEqual(pick(body({})), [undefined, undefined]);
    assert.deepEqual(pick(body({ args: ["a"] })), [undefined, ["a"]]);
    assert.deepEqual(pick(body({ command: ["c"] })), [["c"], []]);
    assert.deepEqual(pick(body({ command: ["c"], args: ["a"] })), [["c"], ["a"]]);
  });

  it("has a digest that tells specifications apart, and neither generations nor networks", () => {
    const digest = (value: ReturnType<typeof body>) => value.Labels?.["clodei.spec_digest"];
    assert.equal(digest(body({}, 1n)), digest(body({}, 2n, "clodei-1")));
    assert.equal(body({}, 2n, "clodei-1").HostConfig?.NetworkMode, "clodei-1");
    assert.notEqual(digest(body({})), digest(body({ memoryMib: 65 })));
  });

  it("gives each network a bridge with a name that a kernel takes", () => {
    const id = "0123456789ab";
    const network = networkBody(settings.nodeId, id, { subnet: "10.0.0.0/29", gateway: "10.0.0.1" });
    const bridge = network.Options?.["com.docker.network.bridge.name"] ?? "";
    assert.equal(bridge, `cl${id}`);
    assert.ok(bridge.length <= 15);
    assert.equal(network.Name, `clodei-${id}`);
    assert.equal(network.EnableIPv6, false);
  });
});

describe("the user of an image", () => {
  const passwd = "root:x:0:0::/:/bin/sh\napp:x:1000:1001::/:/bin/sh\nbad:x:-1:0::/:\n";
  const group = "root:x:0:\ndisk:x:6:root,app\nteam:x:1001:\n\nvideo:x:44:nobody,app\n";
  const resolve = (user: string) => {
    const { uid, gid, groups } = resolveImageUser(user, { passwd, group });
    return [uid, gid, groups?.primary, groups?.supplementary];
  };

  it("is a number as it stands, or a name of its /etc/passwd, with the groups that runc finds", () => {
    assert.deepEqual(resolve(""), [0, 0, [0], [0, 6]]);
    assert.deepEqual(resolve("0"), [0, 0, [0], [0, 6]]);
    assert.deepEqual(resolve("1234"), [1234, 0, [0], [0]]);
    assert.deepEqual(resolve("1234:5"), [1234, 5, [5], [5]]);
    assert.deepEqual(resolve("1000"), [1000, 1001, [1001], [1001, 6, 44]]);
    assert.deepEqual(resolve("app"), [1000, 1001, [1001], [1001, 6, 44]]);
    assert.deepEqual(resolve("app:7"), [1000, 7, [7], [7]]);
    assert.deepEqual(resolve("app:video"), [1000, 44, [44], [44]]);
    for (const user of ["ghost", "bad", "-1", "4294967295", "010"]) assert.throws(() => resolve(user), /does not name/);
  });

  it("has unknown groups where its account files cannot be read, and a name then is nobody", () => {
    assert.deepEqual(resolveImageUser("1234", { passwd, group: undefined }), { uid: 1234, gid: 0, groups: undefined });
    assert.throws(() => resolveImageUser("app", { passwd: undefined, group }), /no plain file/);
  });

  it("is read from a file, never from a link", () => {
    const block = Buffer.alloc(1024);
    block.write("00000000003\0", 124, "latin1");
    block.write("abc", 512);
    block.write("0", 156);
    assert.equal(firstFileOfTar(block), "abc");
    block.write("2", 156);
    assert.equal(firstFileOfTar(block), undefined);
    assert.equal(firstFileOfTar(Buffer.alloc(10)), undefined);
  });
});

describe("registry credentials", () => {
  it("are found by registry, under the names that Docker's tools write", async () => {
    const folder = await mkdtemp(join(tmpdir(), "clodei-auth-"));
    const file = join(folder, "config.json");
    const auth = Buffer.from("me:pass:word").toString("base64");
    try {
      await writeFile(
        file,
        JSON.stringify({ auths: { "https://index.docker.io/v1/": { auth }, "ghcr.io": { auth }, "nvcr.io": {} } }),
      );
      const found = new RegistryAuth(file);
      assert.deepEqual(await found.credentialsFor("docker.io"), {
        username: "me",
        password: "pass:word",
        serveraddress: "docker.io",
      });
      assert.equal((await found.credentialsFor("ghcr.io"))?.username, "me");
      assert.equal(await found.credentialsFor("ghcr.io.evil.example"), undefined);
      await assert.rejects(found.credentialsFor("nvcr.io"), RegistryAuthError);
      await writeFile(file, "{secret");
      await assert.rejects(
        found.credentialsFor("ghcr.io"),
        (error: unknown) => error instanceof RegistryAuthError && !error.message.includes("secret"),
      );
    } finally {
      await rm(folder, { recursive: true, force: true });
    }
  });
});
