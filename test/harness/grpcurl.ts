// grpcurl is what operators use, and no test machine has it: its lines are run as buf curl, which speaks the same
// protocol and asks the same reflection.

/** Flags of grpcurl that our lines use, and what they are for buf curl. */
const flags: Readonly<Record<string, (value: string) => string>> = {
  "-cacert": (file) => `--cacert ${file}`,
  "-H": (header) => `-H ${header}`,
  "-d": (data) => `-d ${data}`,
  "-max-time": (seconds) => `--timeout ${seconds}s`,
};

/** A word of a shell: parts in quotes and parts without. */
const word = /(?:'[^']*'|"(?:\\.|[^"\\])*"|\\.|[^\s'"\\])+/gu;

/**
 * The same as a line for buf curl, for a shell.
 * @throws Error where the line is none that grpcurl would take, as far as our lines go.
 */
export function grpcurlByBuf(line: string): string {
  const [program, ...words] = line.replaceAll("\\\n", " ").match(word) ?? [];
  if (program !== "grpcurl") throw new Error(`no line for grpcurl: ${line}`);
  const told: string[] = [];
  while (words[0]?.startsWith("-") === true) {
    const [flag = "", value = ""] = words.splice(0, words[0] === "-msg-template" ? 1 : 2);
    if (flag === "-msg-template") continue;
    const tell = flags[flag];
    if (tell === undefined) throw new Error(`${flag} is not known here: ${line}`);
    told.push(tell(value));
  }
  const [address = "", ...rest] = words;
  if (address.startsWith("http") || rest.length === 0) throw new Error(`HOST:PORT and a method are missing: ${line}`);
  return ["buf curl --protocol grpc", ...told, targetOf(`https://${address}`, rest)].join(" ");
}

function targetOf(url: string, [verb = "", symbol = ""]: readonly string[]): string {
  switch (verb) {
    case "list":
      return symbol === "" ? `--list-services ${url}` : `--list-methods ${url} | grep -F ${symbol}/`;
    case "describe":
      return `-d '{"fileContainingSymbol": "${symbol}"}' ${url}/grpc.reflection.v1.ServerReflection/ServerReflectionInfo`;
    default:
      return `${url}/${verb}`;
  }
}
