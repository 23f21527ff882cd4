import { describe, it } from "node:test";
import assert from "node:assert/strict";
import { ConfigError, helpText, readCommand } from "./config.ts";

describe("the configuration", () => {
  it("comes from flags before variables before defaults", () => {
    const command = readCommand(["run", "--state", "/tmp/a"], {
      CLODEI_STATE: "/tmp/b",
      CLODEI_LOG_LEVEL: "warn",
      CLODEI_DOCKER_SOCKET: "",
    });
    assert.ok(command.kind === "run");
    assert.deepEqual(
      [command.config.stateFolder, command.config.logLevel, command.config.dockerSocket],
      ["/tmp/a", "warn", "/var/run/docker.sock"],
    );
    assert.ok(command.config.imageAllowlist.includes("docker.io/library/"));
    assert.equal(command.config.simulatedGpus, undefined);
  });

  it("names every wrong setting at once, and repeats no value", () => {
    const args = ["run", "--usage-interval-ms", "often", "--simulate-gpus", "8xMAGIC", "--docker-socket", "relative"];
    assert.throws(
      () => readCommand(args, { CLODEI_LOG_LEVEL: "loud" }),
      (error: unknown) =>
        error instanceof ConfigError &&
        ["--usage-interval-ms", "--simulate-gpus", "--docker-socket", "CLODEI_LOG_LEVEL"].every((name) =>
          error.message.includes(name),
        ),
    );
    assert.throws(() => readCommand(["run", "--no-such-flag"], {}), ConfigError);
    assert.throws(() => readCommand(["dance"], {}), ConfigError);
  });

  it("takes the token from a file, a variable, standard input or, discouraged, a flag", () => {
    const base = ["enroll", "--control-plane", "https://localhost:8443"];
    const of = (args: readonly string[], environment = {}) => {
      const command = readCommand([...base, ...args], environment);
      assert.ok(command.kind === "enroll");
      return command.config;
    };
    assert.deepEqual(of([]).tokenSource, { kind: "stdin" });
    assert.deepEqual(of(["--token-file", "-"]).tokenSource, { kind: "stdin" });
    assert.deepEqual(of(["--token-file", "/t"]).tokenSource, { kind: "file", path: "/t" });
    assert.deepEqual(of([], { CLODEI_ENROLLMENT_TOKEN: "x" }).tokenSource, { kind: "text", token: "x" });
    assert.equal(of([], { CLODEI_ENROLLMENT_TOKEN: "x" }).tokenOnCommandLine, false);
    assert.equal(of(["--token", "x"]).tokenOnCommandLine, true);
    assert.throws(() => of(["--token", "x", "--token-file", "/t"]), ConfigError);
  });

  it("takes a control plane by https alone", () => {
    for (const url of ["http://localhost", "localhost:8443", "https://user:pw@localhost"]) {
      assert.throws(() => readCommand(["enroll", "--control-plane", url], {}), ConfigError);
    }
    assert.throws(() => readCommand(["enroll"], {}), /--control-plane or CLODEI_CONTROL_PLANE must be given/);
  });

  it("is told whole by --help", () => {
    const help = helpText();
    for (const name of [
      "--state",
      "--token-file",
      "--simulate-gpus",
      "CLODEI_ENROLLMENT_TOKEN",
      "CLODEI_IMAGE_ALLOWLIST",
      "enroll",
      "inventory",
    ])
      assert.ok(help.includes(name), name);
  });
});
