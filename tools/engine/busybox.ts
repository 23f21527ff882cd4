// Images without a registry: Debian's static busybox and whatever a caller adds, given to the engine as an archive.
import { execFile } from "node:child_process";
import { readFile } from "node:fs/promises";
import { promisify } from "node:util";
import { callEngine } from "./api.ts";
import { type TarEntry, writeTar } from "./tar.ts";

/** Where Debian's busybox-static stands. */
const busyboxPath = "/bin/busybox";

export interface ImageOptions {
  /** Files besides busybox; an entry with the same path takes its place. */
  readonly files?: readonly TarEntry[];
  /** Lines as in a Dockerfile: 'USER app', 'ENV A=b', 'CMD ["sh"]'. */
  readonly changes?: readonly string[];
}

/**
 * Makes an image of busybox with all its commands, and gives it the reference. The same reference again takes the
 * name away from the older image.
 *
 * @example await importBusybox(engine.socketPath, "docker.io/library/busybox:latest")
 */
export async function importBusybox(socketPath: string, reference: string, options: ImageOptions = {}): Promise<void> {
  const added = options.files ?? [];
  const addedPaths = new Set(added.map((entry) => entry.path));
  const entries = [...(await busyboxEntries()).filter((entry) => !addedPaths.has(entry.path)), ...added];
  const colon = reference.indexOf(":", reference.lastIndexOf("/"));
  await callEngine(socketPath, {
    method: "POST",
    path: "/images/create",
    query: {
      fromSrc: "-",
      repo: colon < 0 ? reference : reference.slice(0, colon),
      tag: colon < 0 ? "latest" : reference.slice(colon + 1),
      changes: ['CMD ["sh"]', "ENV PATH=/bin", ...(options.changes ?? [])],
    },
    body: writeTar(entries),
  });
}

async function busyboxEntries(): Promise<TarEntry[]> {
  const [binary, { stdout }] = await Promise.all([
    readFile(busyboxPath),
    promisify(execFile)(busyboxPath, ["--list"], { timeout: 10_000 }),
  ]);
  const commands = stdout.split("\n").filter((name) => name !== "" && name !== "busybox");
  const text = (path: string, content: string): TarEntry => ({ path, kind: "file", data: Buffer.from(content) });
  return [
    ...["bin", "etc", "root"].map((path): TarEntry => ({ path, kind: "folder" })),
    { path: "tmp", kind: "folder", mode: 0o1777 },
    { path: "bin/busybox", kind: "file", data: binary, mode: 0o755 },
    ...commands.map((name): TarEntry => ({ path: `bin/${name}`, kind: "link", target: "busybox" })),
    text("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/tmp:/bin/sh\n"),
    text("etc/group", "root:x:0:\nnogroup:x:65534:\n"),
  ];
}
