// The PROXY protocol, versions 1 and 2: what a TCP proxy says of a connection before the connection's own bytes. As in
// https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt, and no more lenient than that: whoever writes it is a
// program that an operator trusts, and what is malformed came from somewhere else.
import { isIPv4, isIPv6 } from "node:net";
import type { Verdict } from "../platform/first-bytes.ts";

/** What begins a connection is no header of the PROXY protocol. */
export class ProxyHeaderError extends Error {
  constructor(message: string) {
    super(message);
    this.name = "ProxyHeaderError";
  }
}

/** The client's address; undefined where the proxy speaks for itself (to see whether we live) or does not know it. */
export type ProxiedAddress = string | undefined;

const textStart = Buffer.from("PROXY ", "latin1");
/** Of version 1, with its line's end. */
const maxTextBytes = 107;
const textEnd = "\r\n";
const binaryStart = Buffer.from("\r\n\r\n\0\r\nQUIT\n", "latin1");
const binaryFixedBytes = 16;
/** Of version 2, with its fixed part. Addresses take 36 bytes; the rest is what proxies add of TLS and of clouds. */
const maxBinaryBytes = 2_048;

/**
 * Reads the header that a connection begins with, from all bytes that came so far.
 * @returns undefined while it may become a header.
 * @throws ProxyHeaderError once it cannot become one any more.
 */
export function readProxyHeader(bytes: Buffer): Verdict<ProxiedAddress> | undefined {
  if (begins(bytes, textStart)) return readText(bytes);
  if (begins(bytes, binaryStart)) return readBinary(bytes);
  throw new ProxyHeaderError("the connection does not begin with a PROXY header");
}

/** Whether the bytes begin with the start, as far as there are any. */
function begins(bytes: Buffer, start: Buffer): boolean {
  const length = Math.min(bytes.length, start.length);
  return bytes.subarray(0, length).equals(start.subarray(0, length));
}

function readText(bytes: Buffer): Verdict<ProxiedAddress> | undefined {
  const line = bytes.toString("latin1", 0, maxTextBytes);
  const end = line.indexOf(textEnd);
  if (end === -1) {
    if (bytes.length >= maxTextBytes) throw new ProxyHeaderError(`no end of line within ${maxTextBytes} bytes`);
    return undefined;
  }
  return { value: addressOfText(line.slice(0, end)), takenBytes: end + textEnd.length };
}

function addressOfText(line: string): ProxiedAddress {
  const [, family, source = "", destination = "", sourcePort = "", destinationPort = "", ...rest] = line.split(" ");
  // The rest of such a line is to be ignored.
  if (family === "UNKNOWN") return undefined;
  const isAddress = family === "TCP4" ? isIPv4 : family === "TCP6" ? isIPv6 : () => false;
  const isWhole = rest.length === 0 && isPort(sourcePort) && isPort(destinationPort);
  if (isWhole && isAddress(source) && isAddress(destination) && !source.includes("%")) return source;
  throw new ProxyHeaderError("a malformed line of version 1");
}

function isPort(text: string): boolean {
  return /^(0|[1-9]\d{0,4})$/.test(text) && Number(text) <= 65_535;
}

function readBinary(bytes: Buffer): Verdict<ProxiedAddress> | undefined {
  if (bytes.length < binaryFixedBytes) return undefined;
  const takenBytes = binaryFixedBytes + bytes.readUInt16BE(14);
  if (takenBytes > maxBinaryBytes) throw new ProxyHeaderError(`a header of more than ${maxBinaryBytes} bytes`);
  if (bytes.length < takenBytes) return undefined;
  const versionAndCommand = bytes.readUInt8(12);
  const family = bytes.readUInt8(13);
  const addresses = bytes.subarray(binaryFixedBytes, takenBytes);
  return { value: addressOfBinary(versionAndCommand, family, addresses), takenBytes };
}

function addressOfBinary(versionAndCommand: number, family: number, addresses: Buffer): ProxiedAddress {
  const local = 0x20;
  const proxied = 0x21;
  if (versionAndCommand === local) return undefined;
  if (versionAndCommand !== proxied) throw new ProxyHeaderError("an unknown version or command");
  const unspecified = 0x00;
  const tcp4 = { family: 0x11, bytes: 12 };
  const tcp6 = { family: 0x21, bytes: 36 };
  if (family === unspecified) return undefined;
  if (family === tcp4.family && addresses.length >= tcp4.bytes) return addresses.subarray(0, 4).join(".");
  if (family === tcp6.family && addresses.length >= tcp6.bytes) {
    return (addresses.toString("hex", 0, 16).match(/.{4}/g) ?? []).join(":");
  }
  throw new ProxyHeaderError("no TCP addresses in it");
}
