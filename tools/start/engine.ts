// The Docker engine that containers run on: the machine's, or one of our own where none answers.
import { join } from "node:path";
import { callEngineJson } from "../engine/api.ts";
import { importBusybox } from "../engine/busybox.ts";
import { startPrivateEngine } from "../engine/private-engine.ts";
import { dockerAnswers, dockerSocketOf } from "../setup/docker-socket.mjs";

/** The image of the first instance: inside the allowlist, and not a name that somebody else's image has. */
export const demoImage = "docker.io/library/clodei-demo:latest";

/** An engine that can be used. */
export type Engine = {
  readonly socketPath: string;
  /** Where it comes from, for a person. */
  readonly what: string;
  readonly isPrivate: boolean;
  readonly close: () => Promise<void>;
};

/** Finds an engine or starts one. */
export async function provideEngine(dataFolder: string, progress: (line: string) => void): Promise<Engine> {
  const socket = dockerSocketOf(process.env["DOCKER_HOST"]);
  if ("refused" in socket) throw new Error(socket.refused);
  if (await dockerAnswers(socket.path)) {
    const what = `the engine at ${socket.path}`;
    return { socketPath: socket.path, what, isPrivate: false, close: () => Promise.resolve() };
  }
  if (socket.named) throw new Error(`no Docker engine answers at ${socket.path}, which DOCKER_HOST names`);
  if (process.platform !== "linux" || process.getuid?.() !== 0) {
    throw new Error(`no Docker engine answers at ${socket.path}; starting a private one takes root on Linux`);
  }
  const engine = await startPrivateEngine({
    folder: join(dataFolder, "engine"),
    name: "clodei",
    internet: true,
    progress: (line) => progress(`  ${line}`),
  });
  const what = `a private engine at ${engine.socketPath}`;
  return { socketPath: engine.socketPath, what, isPrivate: true, close: () => engine.close() };
}

/** Gives the engine the demo image, unless it has it. Returns whether it was made. */
export async function provideDemoImage(socketPath: string): Promise<boolean> {
  const filters = JSON.stringify({ reference: [demoImage] });
  const found = await callEngineJson(socketPath, { path: "/images/json", query: { filters } });
  if (Array.isArray(found) && found.length > 0) return false;
  await importBusybox(socketPath, demoImage);
  return true;
}
