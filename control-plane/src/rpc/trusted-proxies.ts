// The proxies that an operator put before us, and whom a request comes from that came through them. A header says what
// whoever sent it wants it to say: one is believed as far as trusted proxies wrote it, and no further.
import { BlockList, isIP, SocketAddress } from "node:net";

/** A range of addresses. */
type Range = { readonly address: string; readonly prefixBits: number; readonly family: "ipv4" | "ipv6" };

/** Addresses whose connections carry those of others. */
export class TrustedProxies {
  readonly #addresses = new BlockList();
  readonly #isEmpty: boolean;

  /** @param ranges as {@link checkProxyRange} takes them. */
  constructor(ranges: readonly string[]) {
    this.#isEmpty = ranges.length === 0;
    for (const text of ranges) {
      const { address, prefixBits, family } = parseRange(text);
      this.#addresses.addSubnet(address, prefixBits, family);
    }
  }

  /** Whether the address is one of them. */
  has(address: string): boolean {
    if (this.#isEmpty) return false;
    const canonical = canonicalAddress(address);
    return canonical !== undefined && this.#addresses.check(canonical, familyOf(canonical));
  }

  /**
   * Where a request comes from: the peer of its connection, or, where that is a trusted proxy, what it says of whom it
   * serves, and so on along the chain. Only X-Forwarded-For is read: of two headers a proxy writes one and hands on
   * what a client put into the other.
   * @param forwardedFor the value of X-Forwarded-For, its nearest hop last.
   */
  origin(peer: string, forwardedFor: string | undefined): string {
    let nearest = canonicalAddress(peer) ?? peer;
    if (forwardedFor === undefined) return nearest;
    // What a client put before it can be as long as a header: only as much is looked at as trusted proxies wrote.
    let end = forwardedFor.length;
    while (end >= 0 && this.has(nearest)) {
      const comma = end === 0 ? -1 : forwardedFor.lastIndexOf(",", end - 1);
      const before = forwardedAddress(forwardedFor.slice(comma + 1, end));
      if (before === undefined) return nearest;
      nearest = before;
      end = comma;
    }
    return nearest;
  }
}

/** @throws Error with what is wrong with a range, such as "10.0.0.0/8", or with an address. */
export function checkProxyRange(text: string): void {
  parseRange(text);
}

function parseRange(text: string): Range {
  const [address = "", bits, ...more] = text.split("/");
  const version = isIP(address);
  const quoted = JSON.stringify(text);
  if (version === 0 || address.includes("%") || more.length > 0) {
    throw new Error(`${quoted} is no address and no range, such as 192.0.2.7, 10.0.0.0/8 or fd00::/8`);
  }
  if (version === 6 && canonicalAddress(address)?.includes(".") === true) {
    throw new Error(`${quoted} is an IPv4 address in IPv6: write it as IPv4`);
  }
  const addressBits = version === 4 ? 32 : 128;
  const prefixBits = bits === undefined ? addressBits : Number(bits);
  if (bits !== undefined && (!/^\d{1,3}$/.test(bits) || prefixBits > addressBits)) {
    throw new Error(`${quoted}: the prefix must be a number up to ${addressBits}`);
  }
  if (prefixBits === 0) throw new Error(`${quoted} would trust everybody`);
  const range: Range = { address, prefixBits, family: version === 4 ? "ipv4" : "ipv6" };
  // All of IPv4 stands in IPv6 as ::ffff:0:0/96, and a wide range around it would hold that.
  if (version === 6 && holdsIPv4(range)) throw new Error(`${quoted} would trust everybody who comes by IPv4`);
  return range;
}

function holdsIPv4({ address, prefixBits, family }: Range): boolean {
  const list = new BlockList();
  list.addSubnet(address, prefixBits, family);
  return list.check("0.0.0.0", "ipv4");
}

/** An address in the one form that it has here; IPv4 within IPv6 is IPv4. Undefined where it is none. */
export function canonicalAddress(text: string): string | undefined {
  const version = isIP(text);
  if (version === 0) return undefined;
  if (version === 4) return text;
  const { address } = new SocketAddress({ address: text.split("%")[0] ?? "", family: "ipv6" });
  return /^::ffff:(\d+\.\d+\.\d+\.\d+)$/i.exec(address)?.[1] ?? address;
}

function familyOf(canonical: string): "ipv4" | "ipv6" {
  return canonical.includes(":") ? "ipv6" : "ipv4";
}

/** The address in one element of X-Forwarded-For. Some proxies write a port behind it. */
function forwardedAddress(element: string): string | undefined {
  const text = element.trim();
  const bare = /^\[([^\]]*)\](?::\d{1,5})?$/.exec(text)?.[1] ?? /^([\d.]+):\d{1,5}$/.exec(text)?.[1] ?? text;
  return canonicalAddress(bare);
}
