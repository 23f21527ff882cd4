// An engine's socket whose list of containers a test holds back: what a loaded engine does by itself.
import { createServer, request } from "node:http";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";

/** A socket in front of an engine's. */
export interface SlowEngine extends AsyncDisposable {
  readonly socketPath: string;
  /** Holds the next list of containers back after the engine gave it; resolves when it is held. */
  readonly holdList: () => Promise<void>;
  /** Lets it go. */
  readonly release: () => void;
}

/** Stands in front of an engine. */
export async function slowEngine(engineSocketPath: string): Promise<SlowEngine> {
  const folder = await mkdtemp(join(tmpdir(), "clodei-slow-"));
  const socketPath = join(folder, "engine.sock");
  let held: PromiseWithResolvers<void> | undefined;
  let gate = Promise.withResolvers<void>();
  const server = createServer((incoming, response) => {
    const { method, url: path, headers } = incoming;
    const outgoing = request({ socketPath: engineSocketPath, method, path, headers, agent: false }, (answer) => {
      void (async () => {
        if (held !== undefined && path?.startsWith("/containers/json") === true) {
          held.resolve();
          held = undefined;
          await gate.promise;
        }
        response.writeHead(answer.statusCode ?? 500, answer.headers);
        answer.pipe(response);
      })();
    });
    outgoing.on("error", () => response.destroy());
    response.on("close", () => outgoing.destroy());
    incoming.pipe(outgoing);
  });
  await new Promise<void>((resolve) => server.listen(socketPath, resolve));
  return {
    socketPath,
    holdList: () => {
      held = Promise.withResolvers<void>();
      gate = Promise.withResolvers<void>();
      return held.promise;
    },
    release: () => gate.resolve(),
    [Symbol.asyncDispose]: async () => {
      gate.resolve();
      server.closeAllConnections();
      await new Promise((resolve) => server.close(resolve));
      await rm(folder, { recursive: true, force: true });
    },
  };
}
