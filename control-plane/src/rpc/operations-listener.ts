// What the machine's own tools ask: alive, ready, metrics. In plain HTTP and on loopback, never reachable from
// outside: metrics say how busy customers are.
import { createServer, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import type { Registry } from "prom-client";
import type { HealthState } from "./health.ts";

const host = "127.0.0.1";

/** An operations listener that listens. */
export type OperationsListener = AsyncDisposable & { readonly url: string };

/** Opens the operations listener. Port 0: any free one. */
export async function startOperationsListener(options: {
  readonly port: number;
  readonly health: HealthState;
  readonly registry: Registry;
}): Promise<OperationsListener> {
  const { health, registry } = options;
  const server = createServer({ requestTimeout: 10_000 }, (request, response) => {
    const path = request.url?.split("?", 1)[0];
    if (request.method !== "GET" && request.method !== "HEAD") answer(response, 405, "method not allowed\n");
    else if (path === "/healthz") answer(response, 200, "ok\n");
    else if (path === "/readyz") {
      if (health.isServing) answer(response, 200, "ready\n");
      else answer(response, 503, `not ready: ${health.reasons.join(", ")}\n`);
    } else if (path === "/metrics") {
      registry.metrics().then(
        (text) => answer(response, 200, text, registry.contentType),
        () => answer(response, 500, "metrics failed\n"),
      );
    } else answer(response, 404, "not found\n");
  });
  await new Promise<void>((resolve, reject) => {
    server.once("error", reject);
    server.listen(options.port, host, resolve);
  });
  const { port } = server.address() as AddressInfo;
  return {
    url: `http://${host}:${port}`,
    async [Symbol.asyncDispose]() {
      const closed = new Promise<void>((resolve) => {
        server.close(() => resolve());
      });
      server.closeAllConnections();
      await closed;
    },
  };
}

function answer(response: ServerResponse, status: number, body: string, type = "text/plain; charset=utf-8"): void {
  response.writeHead(status, { "content-type": type, "cache-control": "no-store" });
  response.end(body);
}
