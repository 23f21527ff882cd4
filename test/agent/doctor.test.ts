// `clodei-agent doctor` on a machine that is well, and on machines that are broken in one way each. A machine is broken
// for the program alone: by namespaces, limits and folders of the test.
import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { chmod, cp, mkdir, mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { createServer as createTlsServer } from "node:https";
import { type AddressInfo, createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, describe, it } from "node:test";
import type { Finding, FindingStatus } from "../../agent/src/doctor/finding.ts";
import { IdentityStore } from "../../agent/src/identity/identity-store.ts";
import { TestAuthority } from "../../agent/src/testing/authority.ts";
import { listen } from "../../agent/src/testing/control-plane.ts";
import { giveIdentity } from "../../agent/src/testing/peer.ts";
import { engineUnavailable, startTestEngine } from "../harness/engine.ts";
import { TestSystem } from "../harness/system.ts";

const program = new URL("../../agent/src/main.ts", import.meta.url).pathname;
const dayMs = 24 * 3_600_000;

interface Examined {
  readonly code: number;
  readonly findings: readonly Finding[];
}

describe("the doctor", { skip: engineUnavailable }, () => {
  let system: TestSystem;
  let folder: string;
  let state: string;
  before(async () => {
    system = await TestSystem.start({ agents: [{ name: "mad-1" }] });
    folder = await mkdtemp(join(tmpdir(), "clodei-doctor-"));
    state = system.agent("mad-1").folder;
  });
  after(async () => {
    await system?.[Symbol.asyncDispose]();
    await rm(folder, { recursive: true, force: true });
  });

  /** Runs it. `broken`: a shell command that breaks the machine and then runs "$@". */
  async function examine(
    args: Readonly<Record<string, string>> = {},
    { broken = 'exec "$@"', wrapper = [] as readonly string[] } = {},
  ): Promise<Examined> {
    const settings = { state, "docker-socket": system.engine.socketPath, "min-free-mib": "16", ...args };
    const flags = Object.entries(settings).flatMap(([name, value]) => [`--${name}`, value]);
    const command = [...wrapper, "sh", "-c", broken, "sh", process.execPath, program, "doctor", "--json", ...flags];
    const [file = "", ...rest] = command;
    const { promise, resolve, reject } = Promise.withResolvers<Examined>();
    execFile(file, rest, { timeout: 60_000 }, (error, stdout, stderr) => {
      try {
        const code = typeof error?.code === "number" ? error.code : 0;
        resolve({ code, findings: JSON.parse(stdout) as Finding[] });
      } catch (cause) {
        reject(new Error(`the doctor printed no findings: ${stdout}${stderr}`, { cause }));
      }
    });
    return promise;
  }

  function expectFinding(
    { code, findings }: Examined,
    check: string,
    status: FindingStatus,
    message: RegExp,
    remedy: RegExp,
  ): void {
    const found = findings.filter((finding) => finding.check === check && finding.status === status);
    assert.equal(found.length, 1, JSON.stringify(findings, undefined, 1));
    assert.match(found[0]?.message ?? "", message);
    assert.match(found[0]?.remedy ?? "", remedy);
    if (status === "failed") assert.equal(code, 1);
  }

  /** A state folder of its own, with the node's identity, to be changed. */
  async function copyOfState(change: (identity: string) => Promise<void>): Promise<string> {
    const copy = await mkdtemp(join(folder, "state-"));
    await cp(join(state, "identity"), join(copy, "identity"), { recursive: true });
    await change(join(copy, "identity"));
    return copy;
  }

  async function changeNode(identity: string, changes: object): Promise<void> {
    const path = join(identity, "node.json");
    await writeFile(path, JSON.stringify({ ...JSON.parse(await readFile(path, "utf8")), ...changes }));
  }

  async function tool(script: string): Promise<string> {
    const path = join(await mkdtemp(join(folder, "tool-")), "nvidia-smi");
    await writeFile(path, `#!/bin/sh\n${script}\n`);
    await chmod(path, 0o755);
    return path;
  }

  it("finds nothing wrong where nothing is, and changes nothing", async () => {
    const { code, findings } = await examine();
    assert.deepEqual(
      findings.filter(({ status }) => status === "failed"),
      [],
    );
    assert.equal(code, 0);
    const well = findings.filter(({ status }) => status === "ok").map(({ check }) => check);
    for (const check of [
      "docker",
      "seccomp",
      "docker-logs",
      "disk",
      "certificate",
      "node-link",
      "control-plane",
      "clock",
    ])
      assert.ok(well.includes(check), `${check}: ${JSON.stringify(findings)}`);
    const untouched = join(folder, "never-made");
    await examine({ state: untouched });
    await assert.rejects(readFile(untouched), /ENOENT/);
  });

  it("Docker is not there, or hangs", async () => {
    const gone = await examine({ "docker-socket": join(folder, "no.sock") });
    expectFinding(gone, "docker", "failed", /there is no socket/, /start the Docker engine/);
    const hanging = createServer(() => {});
    const path = join(folder, "hangs.sock");
    await new Promise<void>((resolve) => hanging.listen(path, resolve));
    try {
      expectFinding(await examine({ "docker-socket": path }), "docker", "failed", /no answer in 10 s/, /journalctl/);
    } finally {
      hanging.close();
    }
  });

  it("the engine cannot limit processes, and its seccomp profile is another one", async () => {
    const profile = join(folder, "allow-all.json");
    await writeFile(profile, JSON.stringify({ defaultAction: "SCMP_ACT_ALLOW" }));
    await using engine = await startTestEngine({
      daemonArguments: ["--seccomp-profile", profile],
      // Out of the engine's sight: as on a kernel that was booted without the controller.
      prelude: "umount /sys/fs/cgroup/pids",
    });
    const examined = await examine({ "docker-socket": engine.socketPath });
    expectFinding(examined, "seccomp", "failed", /not Docker's default/, /seccomp-profile/);
    expectFinding(examined, "cgroups", "failed", /cannot limit pids/, /command line/);
  });

  it("the kernel allows no user namespaces", async () => {
    const examined = await examine(
      {},
      {
        wrapper: ["unshare", "--user", "--map-root-user"],
        broken: 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"',
      },
    );
    expectFinding(examined, "user-namespaces", "warning", /allows none/, /user.max_user_namespaces/);
  });

  it("few files may be open", async () => {
    const examined = await examine({}, { broken: 'ulimit -n 512 && exec "$@"' });
    expectFinding(examined, "file-descriptors", "warning", /no more than 512/, /LimitNOFILE/);
  });

  it("the disk is full", async () => {
    const mountPoint = await mkdtemp(join(folder, "small-"));
    const examined = await examine(
      { state: mountPoint },
      { wrapper: ["unshare", "--mount"], broken: `mount -t tmpfs -o size=8m none ${mountPoint} && exec "$@"` },
    );
    expectFinding(examined, "disk", "failed", /^8 MiB are free .* and 16 are needed/, /larger one/);
  });

  it("a GPU is sick, its driver fails, or the container toolkit is missing", async () => {
    const device = (memory: string) => `<?xml version="1.0"?><nvidia_smi_log><driver_version>580.65.06</driver_version>
      <cuda_version>13.0</cuda_version><gpu id="00000000:1B:00.0"><product_name>NVIDIA H100 80GB HBM3</product_name>
      <uuid>GPU-1</uuid><fb_memory_usage><total>${memory}</total></fb_memory_usage></gpu></nvidia_smi_log>`;
    const sick = await examine({ "nvidia-smi": await tool(`cat <<'X'\n${device("ERR!")}\nX`) });
    expectFinding(sick, "gpus", "failed", /GPU 0 \(GPU-1\): memory: ERR!/, /drain the node/);
    const failing = await examine({ "nvidia-smi": await tool("echo 'Driver/library version mismatch'; exit 18") });
    expectFinding(failing, "gpus", "failed", /exit 18.*version mismatch/, /dmesg/);
    const healthy = await tool(`cat <<'X'\n${device("81559 MiB")}\nX`);
    const without = await examine({ "nvidia-smi": healthy });
    expectFinding(without, "gpus", "ok", /1 healthy, driver 580.65.06/, /^$/);
    expectFinding(without, "container-toolkit", "failed", /no container can get a GPU/, /nvidia-ctk/);
    const hook = join(folder, "nvidia-container-runtime-hook");
    await writeFile(hook, "#!/bin/sh\n");
    await chmod(hook, 0o755);
    const examined = await examine({ "nvidia-smi": healthy }, { broken: `PATH="$PATH:${folder}" exec "$@"` });
    expectFinding(examined, "container-toolkit", "ok", /installed/, /^$/);
  });

  it("the node is not enrolled, its certificate ran out, or its files do not fit", async () => {
    const empty = await examine({ state: await mkdtemp(join(folder, "empty-")) });
    expectFinding(empty, "certificate", "failed", /not enrolled/, /clodei-agent enroll/);
    const authority = await TestAuthority.create();
    const issued = await authority.issueServer([{ type: "dns", value: "localhost" }]);
    await using listener = await listen({ issued, routes: () => {} });
    const expired = await mkdtemp(join(folder, "expired-"));
    await mkdir(join(expired, "identity"), { mode: 0o700 });
    const store = new IdentityStore(join(expired, "identity"));
    const life = { fromMs: Date.now() - 2 * dayMs, toMs: Date.now() + 1500 };
    await giveIdentity(store, authority, listener, life);
    await new Promise((resolve) => setTimeout(resolve, life.toMs - Date.now() + 10));
    expectFinding(await examine({ state: expired }), "certificate", "failed", /it ran out on/, /start the agent/);
    const broken = await copyOfState((identity) => rm(join(identity, "key.pem")));
    expectFinding(await examine({ state: broken }), "certificate", "failed", /./, /ReenrollNode/);
  });

  it("the control plane does not listen, cannot be found, or is somebody else", async () => {
    const closed = createServer();
    await new Promise<void>((resolve) => closed.listen(0, "127.0.0.1", resolve));
    const { port } = closed.address() as AddressInfo;
    closed.close();
    const nobody = await copyOfState((identity) =>
      changeNode(identity, { nodeEndpoint: `127.0.0.1:${port}`, controlPlaneUrl: `https://127.0.0.1:${port}` }),
    );
    const refused = await examine({ state: nobody });
    expectFinding(refused, "node-link", "failed", /ECONNREFUSED/, /nobody listens/);
    expectFinding(refused, "control-plane", "failed", /ECONNREFUSED/, /nobody listens/);
    // Without a network no question for a name leaves this machine.
    const unknown = await copyOfState((identity) =>
      changeNode(identity, { nodeEndpoint: "nowhere.invalid:443", controlPlaneUrl: "https://nowhere.invalid" }),
    );
    const lost = await examine({ state: unknown }, { wrapper: ["unshare", "--net"] });
    expectFinding(lost, "node-link", "failed", /nowhere\.invalid/, /does not resolve/);
    const stranger = await TestAuthority.create("A stranger");
    const deceived = await copyOfState((identity) => changeNode(identity, { trust: stranger.rootPem }));
    expectFinding(await examine({ state: deceived }), "node-link", "failed", /certificate/, /somebody else answers/);
  });

  it("the clock is wrong", async () => {
    const authority = await TestAuthority.create();
    const { keyPem, certificatePem } = await authority.issueServer([{ type: "ip", value: "127.0.0.1" }]);
    let skewMs = 0;
    await using server = createTlsServer({ key: keyPem, cert: certificatePem }, (_, response) => {
      response.setHeader("date", new Date(Date.now() + skewMs).toUTCString());
      response.end();
    });
    await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
    const { port } = server.address() as AddressInfo;
    const copy = await copyOfState((identity) =>
      changeNode(identity, { controlPlaneUrl: `https://127.0.0.1:${port}`, trust: authority.rootPem }),
    );
    expectFinding(await examine({ state: copy }), "clock", "ok", /agrees/, /^$/);
    skewMs = 3_600_000;
    expectFinding(await examine({ state: copy }), "clock", "failed", /^3(59\d|60\d) s behind/, /NTP/);
    skewMs = -10_000;
    expectFinding(await examine({ state: copy }), "clock", "warning", /^1[01] s ahead of/, /NTP/);
  });

  it("says it to a person as well", async () => {
    const { promise, resolve } = Promise.withResolvers<string>();
    const args = [program, "doctor", "--state", state, "--docker-socket", join(folder, "no.sock")];
    execFile(process.execPath, args, (_, stdout) => resolve(stdout));
    const text = await promise;
    assert.match(text, /^FAILED\s+docker\s+there is no socket/m);
    assert.match(text, /^\s+→ start the Docker engine/m);
    assert.match(text, /\d+ failed, \d+ warnings, \d+ ok\n$/);
  });
});
