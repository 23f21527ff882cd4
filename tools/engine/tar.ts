// A writer of tar archives in memory: images and layers for tests and demos are a handful of small files, and the
// format of such files is two pages. No dependency, because the start command uses it too.

/** A file, folder or symbolic link of an archive. Paths are relative to the archive's root. */
export type TarEntry =
  | {
      readonly path: string;
      readonly kind: "file";
      readonly data: Uint8Array;
      readonly mode?: number;
      readonly uid?: number;
    }
  | { readonly path: string; readonly kind: "folder"; readonly mode?: number; readonly uid?: number }
  | { readonly path: string; readonly kind: "link"; readonly target: string };

const blockBytes = 512;
/** The format's field for a path. Longer ones would need its extensions. */
const maxPathBytes = 100;

/** Writes an archive. Owners are root unless a UID is given; times are 0, so that the same entries give the same bytes. */
export function writeTar(entries: readonly TarEntry[]): Buffer<ArrayBuffer> {
  const parts: Uint8Array[] = [];
  for (const entry of entries) {
    parts.push(header(entry));
    if (entry.kind === "file") {
      parts.push(entry.data, Buffer.alloc((blockBytes - (entry.data.length % blockBytes)) % blockBytes));
    }
  }
  parts.push(Buffer.alloc(2 * blockBytes));
  return Buffer.concat(parts);
}

function header(entry: TarEntry): Buffer {
  const block = Buffer.alloc(blockBytes);
  const path = entry.kind === "folder" ? `${entry.path}/` : entry.path;
  const target = entry.kind === "link" ? entry.target : "";
  if (Buffer.byteLength(path) > maxPathBytes || Buffer.byteLength(target) > maxPathBytes) {
    throw new RangeError(`a path of more than ${maxPathBytes} bytes: ${path} ${target}`);
  }
  const number = (value: number, offset: number, width: number): void => {
    block.write(`${value.toString(8).padStart(width - 1, "0")}\0`, offset, "latin1");
  };
  const uid = entry.kind === "link" ? 0 : (entry.uid ?? 0);
  block.write(path, 0, "utf8");
  number(entry.kind === "link" ? 0o777 : (entry.mode ?? (entry.kind === "folder" ? 0o755 : 0o644)), 100, 8);
  number(uid, 108, 8);
  number(uid, 116, 8);
  number(entry.kind === "file" ? entry.data.length : 0, 124, 12);
  number(0, 136, 12);
  block.write({ file: "0", folder: "5", link: "2" }[entry.kind], 156, "latin1");
  block.write(target, 157, "utf8");
  block.write("ustar\x0000", 257, "latin1");
  // The checksum counts its own field as blanks.
  block.fill(" ", 148, 156);
  number(
    block.reduce((sum, byte) => sum + byte, 0),
    148,
    7,
  );
  return block;
}
