// Programs of the system that a command needs: installed on Debian as root, named in one message elsewhere.
import { spawn } from "node:child_process";
import { accessSync, closeSync, constants, existsSync, openSync, readFileSync, readSync } from "node:fs";
import { delimiter, join } from "node:path";

/** Administrator's folders, which an ordinary user's PATH lacks on Debian. */
const administratorFolders = ["/usr/local/sbin", "/usr/sbin", "/sbin"];
/** Another package manager may be at work (unattended upgrades): wait for it this long. */
const aptLockTimeoutS = 300;

/**
 * @param {string} name
 * @returns {string | undefined} the path of an executable in PATH or in the administrator's folders
 */
export function findProgram(name) {
  for (const folder of [...(process.env["PATH"] ?? "").split(delimiter), ...administratorFolders]) {
    if (folder === "") continue;
    try {
      accessSync(join(folder, name), constants.X_OK);
      return join(folder, name);
    } catch {
      // Not in this folder.
    }
  }
  return undefined;
}

/**
 * Whether a program is a statically linked ELF file, so that it runs in an image that holds nothing else.
 * @param {string} path
 */
export function isStatic(path) {
  const file = openSync(path, "r");
  try {
    const header = Buffer.alloc(64);
    // 64-bit little-endian ELF alone: what x64 and arm64 have.
    if (readSync(file, header, 0, 64, 0) < 64 || header.toString("latin1", 0, 6) !== "\x7fELF\x02\x01") return false;
    const [offset, size, count] = [
      Number(header.readBigUInt64LE(32)),
      header.readUInt16LE(54),
      header.readUInt16LE(56),
    ];
    const interpreter = 3;
    for (let index = 0; index < count; index += 1) {
      const entry = Buffer.alloc(4);
      readSync(file, entry, 0, 4, offset + index * size);
      if (entry.readUInt32LE(0) === interpreter) return false;
    }
    return true;
  } finally {
    closeSync(file);
  }
}

function isDebian() {
  if (!existsSync("/etc/os-release") || findProgram("apt-get") === undefined) return false;
  return /^ID(?:_LIKE)?=.*\bdebian\b/mu.test(readFileSync("/etc/os-release", "utf8"));
}

/** What can be needed: the package of Debian, and how to see that it is there. */
const needs = {
  engine: {
    package: "docker.io",
    what: "Docker's engine (dockerd)",
    isThere: () => findProgram("dockerd") !== undefined,
  },
  busybox: {
    package: "busybox-static",
    what: "a statically linked busybox",
    isThere: () => {
      const path = findProgram("busybox");
      return path !== undefined && isStatic(path);
    },
  },
  registry: {
    package: "docker-registry",
    what: "docker-registry",
    isThere: () => findProgram("docker-registry") !== undefined,
  },
  curl: { package: "curl", what: "curl", isThere: () => findProgram("curl") !== undefined },
  python: {
    package: "python3-grpcio",
    what: "gRPC for the system's Python",
    isThere: () => existsSync("/usr/lib/python3/dist-packages/grpc/__init__.py"),
  },
  browser: { package: "chromium", what: "chromium", isThere: () => findProgram("chromium") !== undefined },
  clock: {
    package: "faketime",
    what: "libfaketime",
    isThere: () => findProgram("faketime") !== undefined,
  },
  ip: { package: "iproute2", what: "ip", isThere: () => findProgram("ip") !== undefined },
  iptables: { package: "iptables", what: "iptables", isThere: () => findProgram("iptables") !== undefined },
  namespaces: {
    package: "util-linux",
    what: "nsenter, setpriv and unshare",
    isThere: () => ["nsenter", "setpriv", "unshare"].every((name) => findProgram(name) !== undefined),
  },
  certificates: {
    package: "ca-certificates",
    what: "the roots of public certificates",
    isThere: () => existsSync("/etc/ssl/certs/ca-certificates.crt") || existsSync("/etc/pki/tls/certs"),
  },
};

function runApt(parameters) {
  return new Promise((resolve, reject) => {
    const child = spawn("apt-get", ["-qq", "-o", `DPkg::Lock::Timeout=${aptLockTimeoutS}`, ...parameters], {
      env: { ...process.env, DEBIAN_FRONTEND: "noninteractive" },
      stdio: ["ignore", "pipe", "pipe"],
    });
    let output = "";
    for (const stream of [child.stdout, child.stderr]) stream.on("data", (chunk) => (output += chunk));
    child.once("error", reject);
    child.once("close", (code) => resolve({ code, output }));
  });
}

/**
 * @param {readonly string[]} packages
 * @param {(line: string) => void} progress
 * @returns {Promise<string | undefined>} what could not be installed, in the words of apt-get
 */
async function aptInstall(packages, progress) {
  progress(`Debian packages: installing ${packages.join(", ")}`);
  const install = ["install", "--yes", "--no-install-recommends"];
  // The lists of a fresh machine are empty and those of an old one name files that are gone: update, once.
  if ((await runApt([...install, ...packages])).code === 0) return undefined;
  await runApt(["update"]);
  if ((await runApt([...install, ...packages])).code === 0) return undefined;
  // One that this system does not have must not keep the others away.
  const failures = [];
  for (const name of packages) {
    const { code, output } = await runApt([...install, name]);
    if (code !== 0) failures.push(`apt-get could not install ${name}:\n${output.trim()}`);
  }
  return failures.length === 0 ? undefined : failures.join("\n");
}

/**
 * What of the names given is missing here.
 * @param {readonly (keyof typeof needs)[]} names
 */
export function missingOf(names) {
  return names.map((name) => needs[name]).filter((need) => !need.isThere());
}

/**
 * Installs what is missing where we may.
 * @param {readonly (keyof typeof needs)[]} names
 * @param {(line: string) => void} progress
 * @returns {Promise<string | undefined>} what is still missing and how to get it, in one message for a person
 */
export async function provide(names, progress) {
  const missing = missingOf(names);
  if (missing.length === 0) return undefined;
  const packages = missing.map((need) => need.package);
  if (process.platform === "linux" && isDebian()) {
    if (process.getuid?.() === 0) return aptInstall(packages, progress);
    return `missing: ${missing.map((need) => need.what).join(", ")}. Install with: sudo apt-get install --no-install-recommends ${packages.join(" ")}`;
  }
  if (process.platform === "linux") {
    return `missing: ${missing.map((need) => need.what).join(", ")}. Install them with your system's package manager (on Debian: ${packages.join(" ")}).`;
  }
  return `missing: a Linux machine. Containers, and the engine that runs them, need ${missing.map((need) => need.what).join(", ")} on Linux; use one (Debian is tested) or a virtual machine with it.`;
}
