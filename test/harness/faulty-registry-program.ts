// The process of FaultyRegistry, inside the engine's network namespace: passes requests on to a registry, with the faults
// that it is told. Ends when its test does.
import { createServer, type IncomingMessage, request, type ServerResponse } from "node:http";
import { setTimeout as wait } from "node:timers/promises";
import type { RegistryAnswer, RegistryFault, RegistryOrder, RegistryReply } from "./faulty-registry.ts";

/** Small, so that a slow answer comes evenly. */
const chunkBytes = 16_384;

const [port = "", target = ""] = process.argv.slice(2);
/** By repository. */
const faults = new Map<string, { readonly fault: RegistryFault; left: number }>();
const answers: RegistryAnswer[] = [];

const server = createServer((incoming, outgoing) => {
  const url = new URL(incoming.url ?? "/", `http://${target}`);
  const { method, headers } = incoming;
  const passed = request({ host: url.hostname, port: url.port, path: url.pathname + url.search, method, headers });
  passed.on("response", (answer) => void pass(incoming, answer, outgoing).catch(() => outgoing.destroy()));
  passed.on("error", () => outgoing.destroy());
  outgoing.on("close", () => passed.destroy());
  incoming.pipe(passed);
});

async function pass(incoming: IncomingMessage, answer: IncomingMessage, outgoing: ServerResponse): Promise<void> {
  const status = answer.statusCode ?? 0;
  const noted = { path: incoming.url ?? "", range: incoming.headers.range, status, bytes: 0 };
  if (incoming.method === "GET") answers.push(noted);
  const fault = takeFault(incoming, answer);
  outgoing.writeHead(status, answer.headers);
  for await (const chunk of chunksOf(answer)) {
    if (fault?.kind === "damage") damage(chunk);
    if (fault?.kind === "slow") await wait((chunk.length * 1000) / fault.bytesPerSecond);
    if ((fault?.kind === "cut" || fault?.kind === "stall") && noted.bytes + chunk.length > fault.afterBytes) {
      if (fault.kind === "cut") outgoing.socket?.resetAndDestroy();
      return;
    }
    noted.bytes += chunk.length;
    if (!outgoing.write(chunk)) await drained(outgoing);
  }
  outgoing.end();
}

/** The fault that an answer meets, if any. It is used up by it. */
function takeFault(incoming: IncomingMessage, answer: IncomingMessage): RegistryFault | undefined {
  const [, repository = "", kind = ""] = /^\/v2\/(.+)\/(blobs|manifests)\//.exec(incoming.url ?? "") ?? [];
  const found = faults.get(repository);
  if (found === undefined || found.left === 0 || incoming.method !== "GET" || (answer.statusCode ?? 0) >= 300) return;
  const { of = "blobs", leastBytes = 0 } = found.fault;
  if (kind !== of || Number(answer.headers["content-length"] ?? 0) < leastBytes) return;
  found.left -= 1;
  return found.fault;
}

/** A manifest stays one, of another layer. */
function damage(chunk: Buffer): void {
  const digest = chunk.lastIndexOf("sha256:");
  if (digest < 0) chunk[0] = (chunk[0] ?? 0) ^ 0xff;
  else chunk.write(chunk.toString("latin1", digest + 7, digest + 8) === "0" ? "1" : "0", digest + 7, "latin1");
}

async function* chunksOf(answer: IncomingMessage): AsyncGenerator<Buffer> {
  for await (const part of answer as AsyncIterable<Buffer>) {
    for (let at = 0; at < part.length; at += chunkBytes) yield part.subarray(at, at + chunkBytes);
  }
}

async function drained(outgoing: ServerResponse): Promise<void> {
  const { promise, resolve } = Promise.withResolvers<void>();
  outgoing.once("drain", resolve).once("close", resolve);
  await promise;
  outgoing.off("drain", resolve).off("close", resolve);
}

process.on("message", (order: RegistryOrder) => {
  if (order.kind === "fault") {
    const { repository, fault } = order;
    if (fault === undefined) faults.delete(repository);
    else faults.set(repository, { fault, left: fault.times ?? Number.POSITIVE_INFINITY });
  }
  const reply: RegistryReply = { id: order.id, answers };
  process.send?.(reply);
});
process.on("disconnect", () => process.exit(0));
server.listen(Number(port), "127.0.0.1", () => process.send?.("listening"));
