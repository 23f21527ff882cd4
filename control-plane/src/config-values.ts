// How the texts of settings are read. What a parser throws is told with the setting's name before it.
import { isIPv6 } from "node:net";
import { type LogLevel, logLevels } from "./platform/log.ts";
import { checkProxyRange } from "./rpc/trusted-proxies.ts";

/** Text without what stands around it. */
export function parseText(text: string): string {
  return text.trim();
}

/** A TCP port; 0 lets the system choose. */
export function parsePort(text: string): number {
  return parseInteger(0, 65_535)(text);
}

/** "host:port", or nothing. */
export function parseEndpoint(text: string): string {
  if (text === "") return text;
  const port = Number(/^(?:\[[0-9a-fA-F:]+\]|[A-Za-z0-9.-]+):(\d{1,5})$/.exec(text)?.[1] ?? 0);
  if (port < 1 || port > 65_535 || !URL.canParse(`https://${text}`)) throw new Error("must be host:port");
  return text;
}

/** A whole number within bounds. */
export function parseInteger(least: number, most: number): (text: string) => number {
  return (text) => {
    const value = Number(text);
    if (!/^\d{1,15}$/.test(text) || value < least || value > most) {
      throw new Error(`must be a whole number from ${least} to ${most}, not ${JSON.stringify(text)}`);
    }
    return value;
  };
}

/** Parts between commas, without those that are empty. */
export function parseList(text: string): readonly string[] {
  return text
    .split(",")
    .map((part) => part.trim())
    .filter((part) => part !== "");
}

/** "on" or "off". */
export function parseSwitch(text: string): boolean {
  if (text !== "on" && text !== "off") throw new Error(`must be on or off, not ${JSON.stringify(text)}`);
  return text === "on";
}

/** Addresses and ranges between commas. */
export function parseProxyRanges(text: string): readonly string[] {
  const ranges = parseList(text);
  for (const range of ranges) checkProxyRange(range);
  return ranges;
}

/** ISO 3166-1 codes between commas. */
export function parseCountries(text: string): readonly string[] {
  const countries = parseList(text);
  const wrong = countries.find((country) => !/^[A-Z]{2}$/.test(country));
  if (wrong !== undefined) throw new Error(`${JSON.stringify(wrong)} is not an ISO 3166-1 code of two capital letters`);
  if (countries.length === 0) throw new Error("names at least one country");
  return countries;
}

/** A name of a level. */
export function parseLogLevel(text: string): LogLevel {
  const level = logLevels.find((known) => known === text);
  if (level === undefined) throw new Error(`must be one of ${logLevels.join(", ")}`);
  return level;
}

/** Whether a host to listen on means every address of the machine, and so names none. */
export function isWildcard(host: string): boolean {
  // URL knows the many forms of one address.
  const name = URL.parse(`http://${isIPv6(host) ? `[${host}]` : host}`)?.hostname;
  return name === "0.0.0.0" || name === "[::]" || name === "[::ffff:0:0]";
}

/** Whether a host, as a URL has it, is this machine. */
export function isLoopback(host: string): boolean {
  return host === "localhost" || host === "[::1]" || host === "::1" || /^127\.\d+\.\d+\.\d+$/.test(host);
}
