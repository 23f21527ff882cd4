// The way out of an engine's network namespace, where one is wanted: a veth pair, forwarding, and masquerade rules
// that carry the namespace's name, so that exactly these are taken away again.
import { createHash } from "node:crypto";
import { mkdir, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { runTool, tryTool } from "./shell.ts";

/** Two addresses for each engine are cut from here; 10.211.0.0/16 and 10.213.0.0/16 are used inside. */
const linkNetworkPrefix = "10.212";
const linkNetworks = 256 * 64;

/** Each engine that needs forwarding has a file here; the last one to leave puts the old setting back. */
const forwardingFolder = "/run/clodei-forwarding";
const forwardingSetting = "/proc/sys/net/ipv4/ip_forward";
const forwardingOriginal = "original";

/** What was made. Enough to undo it after a crash. */
export interface OutsideLink {
  readonly namespace: string;
  readonly hostLink: string;
  readonly network: string;
}

/** Names the link and picks its addresses, without making anything yet: what is written down first can be undone. */
export async function planOutsideLink(namespace: string, id: string): Promise<OutsideLink> {
  const taken = await runTool("ip", "-4", "-oneline", "address", "show");
  const start = createHash("sha256").update(id).digest().readUInt32BE(0) % linkNetworks;
  for (let step = 0; step < linkNetworks; step += 1) {
    const index = (start + step) % linkNetworks;
    const network = `${linkNetworkPrefix}.${index >> 6}.${(index & 63) * 4}`;
    if (!taken.includes(` ${hostAddress(network)}/`)) return { namespace, hostLink: `ce${id}`, network };
  }
  throw new Error(`no network is free in ${linkNetworkPrefix}.0.0/16`);
}

/** Connects the namespace. */
export async function connectOutside(link: OutsideLink): Promise<void> {
  const { namespace, hostLink, network } = link;
  await runTool("ip", "link", "add", hostLink, "type", "veth", "peer", "name", "outside", "netns", namespace);
  await runTool("ip", "address", "add", `${hostAddress(network)}/30`, "dev", hostLink);
  await runTool("ip", "link", "set", hostLink, "up");
  await runTool("ip", "-n", namespace, "address", "add", `${innerAddress(network)}/30`, "dev", "outside");
  await runTool("ip", "-n", namespace, "link", "set", "outside", "up");
  await runTool("ip", "-n", namespace, "route", "add", "default", "via", hostAddress(network));
  await holdForwarding(namespace);
  for (const rule of rules(link))
    await runTool("iptables", "-w", "-t", rule.table, rule.add, rule.chain, ...rule.match);
}

/** Undoes it. What is not there is no error. */
export async function disconnectOutside(link: OutsideLink): Promise<void> {
  for (const rule of rules(link)) {
    // A crash between two starts could have left a rule twice.
    while (await tryTool("iptables", "-w", "-t", rule.table, "-D", rule.chain, ...rule.match));
  }
  await tryTool("ip", "link", "delete", link.hostLink);
  await releaseForwarding(link.namespace);
}

function hostAddress(network: string): string {
  return network.replace(/\d+$/, (last) => String(Number(last) + 1));
}

function innerAddress(network: string): string {
  return network.replace(/\d+$/, (last) => String(Number(last) + 2));
}

function rules(link: OutsideLink) {
  const comment = ["-m", "comment", "--comment", link.namespace];
  const replies = ["-m", "conntrack", "--ctstate", "RELATED,ESTABLISHED"];
  return [
    {
      table: "nat",
      add: "-A",
      chain: "POSTROUTING",
      match: ["-s", `${link.network}/30`, "!", "-o", link.hostLink, ...comment, "-j", "MASQUERADE"],
    },
    // At the front: another Docker engine on this machine sets the chain's policy to DROP.
    { table: "filter", add: "-I", chain: "FORWARD", match: ["-i", link.hostLink, ...comment, "-j", "ACCEPT"] },
    {
      table: "filter",
      add: "-I",
      chain: "FORWARD",
      match: ["-o", link.hostLink, ...replies, ...comment, "-j", "ACCEPT"],
    },
  ] as const;
}

async function holdForwarding(namespace: string): Promise<void> {
  await mkdir(forwardingFolder, { recursive: true, mode: 0o700 });
  const before = await readFile(forwardingSetting, "latin1");
  // Only the first holder writes what was there before.
  await writeFile(join(forwardingFolder, forwardingOriginal), before, { flag: "wx" }).catch(() => {});
  await writeFile(join(forwardingFolder, namespace), "");
  await writeFile(forwardingSetting, "1");
}

async function releaseForwarding(namespace: string): Promise<void> {
  await rm(join(forwardingFolder, namespace), { force: true });
  const holders = await readdir(forwardingFolder).catch(() => undefined);
  if (holders === undefined || holders.some((name) => name !== forwardingOriginal)) return;
  const original = await readFile(join(forwardingFolder, forwardingOriginal), "latin1").catch(() => undefined);
  if (original !== undefined) await writeFile(forwardingSetting, original);
  await rm(forwardingFolder, { recursive: true, force: true });
}

/** Resolvers that also work outside of the host's own loopback; empty where there are none. */
export async function usableResolvers(): Promise<string[]> {
  // The second file is where systemd-resolved, which listens on loopback, names the servers that it asks itself.
  for (const file of ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"]) {
    const text = await readFile(file, "utf8").catch(() => "");
    const servers = [...text.matchAll(/^\s*nameserver\s+(\S+)/gm)].map((match) => match[1] ?? "");
    const usable = servers.filter((server) => !/^(127\.|::1$|0\.0\.0\.0$)/.test(server));
    if (usable.length > 0) return usable;
  }
  return [];
}
