#!/usr/bin/env node
// clodei-agent: the composition root. Reads the configuration, runs one command, sets the exit code.

import { readFile } from "node:fs/promises";
import { createInterface } from "node:readline";
import { hostname } from "node:os";
import { join } from "node:path";
import { toJson } from "@bufbuild/protobuf";
import { ErrorReason } from "@clodei/proto/gen/clodei/v1/error";
import { NodeInventorySchema } from "@clodei/proto/gen/clodei/v1/inventory";
import packageJson from "../package.json" with { type: "json" };
import { ConfigError, helpText, readCommand } from "./config.ts";
import type { DoctorConfig, EnrollConfig, InventoryConfig } from "./config.ts";
import { examine } from "./doctor/doctor.ts";
import { describeFindings } from "./doctor/finding.ts";
import { messageOf, reasonOf } from "./error-reason.ts";
import { foreignFolder, ownerOf } from "./folder-owner.ts";
import { enroll } from "./identity/enroll.ts";
import { IdentityStore } from "./identity/identity-store.ts";
import { StateFolder, statePaths } from "./identity/state-folder.ts";
import { describeInventory } from "./inventory/describe.ts";
import { createLog } from "./log.ts";
import { openInventory, runAgent } from "./run.ts";

/** What service managers are told. */
const exitCodes = { stopped: 0, failed: 1, usage: 2, revoked: 3, replaced: 4 } as const;

async function main(args: readonly string[], signal: AbortSignal): Promise<number> {
  const command = readCommand(args);
  switch (command.kind) {
    case "help":
      process.stdout.write(helpText());
      return exitCodes.stopped;
    case "version":
      process.stdout.write(`${packageJson.version}\n`);
      return exitCodes.stopped;
    case "enroll":
      await enrollCommand(command.config, signal);
      return exitCodes.stopped;
    case "inventory":
      await inventoryCommand(command.config, command.json);
      return exitCodes.stopped;
    case "doctor":
      return await doctorCommand(command.config, command.json);
    case "run": {
      const log = createLog(command.config.logLevel);
      return exitCodes[await runAgent({ config: command.config, agentVersion: packageJson.version, log, signal })];
    }
  }
}

async function enrollCommand(config: EnrollConfig, signal: AbortSignal): Promise<void> {
  if (config.tokenOnCommandLine) {
    process.stderr.write(
      "clodei-agent: --token shows in the process list; prefer --token-file or CLODEI_ENROLLMENT_TOKEN\n",
    );
  }
  using state = await StateFolder.open(config.stateFolder);
  const store = new IdentityStore(state.paths.identity);
  const owner = await ownerOf(state.paths);
  const token = await readToken(config.tokenSource);
  const enrolled = await store.load().catch(() => undefined);
  const identity = await enroll({
    store,
    refusalOf: (nodeId) =>
      owner === undefined || owner === nodeId ? undefined : foreignFolder(config.stateFolder, owner, nodeId),
    controlPlaneUrl: config.controlPlaneUrl,
    token,
    agentVersion: packageJson.version,
    signal,
  }).catch((error: unknown) => {
    const cause = error instanceof Error ? error.cause : undefined;
    if (enrolled !== undefined && reasonOf(cause) === ErrorReason.ENROLLMENT_TOKEN_INVALID)
      process.stderr.write(`clodei-agent: this folder is enrolled already, as ${enrolled.nodeId}: \`run\` uses it\n`);
    throw error;
  });
  process.stdout.write(`enrolled as ${identity.nodeId} (${identity.nodeName}), ${identity.location}\n`);
}

async function readToken(source: EnrollConfig["tokenSource"]): Promise<string> {
  switch (source.kind) {
    case "text":
      return source.token;
    case "file":
      return (await readFile(source.path, "utf8")).trim();
    case "stdin": {
      if (process.stdin.isTTY) process.stderr.write("Enrollment token: ");
      const lines = createInterface({ input: process.stdin });
      for await (const line of lines) {
        lines.close();
        return line.trim();
      }
      throw new ConfigError(
        "no enrollment token: give --token-file, CLODEI_ENROLLMENT_TOKEN or a line on standard input",
      );
    }
  }
}

async function inventoryCommand(config: InventoryConfig, json: boolean): Promise<void> {
  const paths = statePaths(config.stateFolder);
  const identity = await new IdentityStore(paths.identity).load().catch(() => undefined);
  const inventory = await openInventory({
    config,
    nodeName: identity?.nodeId ?? hostname(),
    workspaceFolder: identity === undefined ? "/" : join(paths.workspaces),
    dockerVersion: () => "",
  });
  const current = inventory.current();
  const text = json
    ? JSON.stringify(toJson(NodeInventorySchema, current, { alwaysEmitImplicit: true }), undefined, 2)
    : describeInventory(current);
  process.stdout.write(`${text}\n`);
}

async function doctorCommand(config: DoctorConfig, json: boolean): Promise<number> {
  const findings = await examine(config);
  process.stdout.write(`${json ? JSON.stringify(findings, undefined, 2) : describeFindings(findings)}\n`);
  return findings.some(({ status }) => status === "failed") ? exitCodes.failed : exitCodes.stopped;
}

const stop = new AbortController();
for (const name of ["SIGTERM", "SIGINT"] as const) process.once(name, () => stop.abort(new Error(name)));

try {
  process.exitCode = await main(process.argv.slice(2), stop.signal);
} catch (error) {
  process.stderr.write(`clodei-agent: ${messageOf(error)}\n`);
  process.exitCode = error instanceof ConfigError ? exitCodes.usage : exitCodes.failed;
}
// Sockets that the engine or the control plane keeps open must not keep a stopped agent alive.
setTimeout(() => process.exit(), 1000).unref();
