// Where the CA lives: PEM from a mounted secret, or DATA/ca, made at first start. Key and certificate of our own
// stand in one file, so that no crash leaves one without the other.
import { randomBytes } from "node:crypto";
import { link, mkdir, open, readFile, rm, stat, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { Authority } from "./authority.ts";

/** Paths of PEM files that were mounted. */
export type AuthorityFiles = { readonly certificateFile: string; readonly privateKeyFile: string };

/** What tells where the CA is. */
export type AuthoritySource = {
  /** The folder of our own CA, DATA/ca. Not touched where files are given. */
  readonly folder: string;
  readonly files?: AuthorityFiles | undefined;
  readonly trustDomain: string;
};

/** Key and certificate, readable by the owner alone. */
const secretFile = "authority.pem";
/** The certificate, for people and their tools. */
const publicFile = "certificate.pem";

const certificatePattern = /-----BEGIN CERTIFICATE-----[\s\S]+?-----END CERTIFICATE-----/;
const privateKeyPattern = /-----BEGIN PRIVATE KEY-----[\s\S]+?-----END PRIVATE KEY-----/;

/**
 * Opens the CA, and makes it where there is none yet. Two starters at once open the same one.
 *
 * @throws Error that says what is wrong with the files, and never quotes the key.
 */
export async function openAuthority(source: AuthoritySource, now: Date): Promise<Authority> {
  if (source.files !== undefined) {
    const [certificatePem, privateKeyPem] = await Promise.all([
      readFile(source.files.certificateFile, "utf8"),
      readFile(source.files.privateKeyFile, "utf8"),
    ]);
    return Authority.fromPem(certificatePem, privateKeyPem, source.trustDomain, now);
  }
  await mkdir(source.folder, { recursive: true, mode: 0o700 });
  const path = join(source.folder, secretFile);
  const pem = (await readIfThere(path)) ?? (await createFile(source.folder, path, now));
  await assertPrivate(path);
  const [certificatePem] = certificatePattern.exec(pem) ?? [];
  const [privateKeyPem] = privateKeyPattern.exec(pem) ?? [];
  if (certificatePem === undefined || privateKeyPem === undefined) {
    throw new Error(
      `${path} holds no certificate and private key: restore it from a backup, or every node must enroll again`,
    );
  }
  const authority = await Authority.fromPem(certificatePem, privateKeyPem, source.trustDomain, now);
  await writeFile(join(source.folder, publicFile), authority.certificatePem, { mode: 0o644 });
  return authority;
}

/** Makes the file whole or not at all, and takes the other starter's where that was faster. */
async function createFile(folder: string, path: string, now: Date): Promise<string> {
  const { certificatePem, privateKeyPem } = await Authority.generate(now);
  const temporary = join(folder, `.${secretFile}.${randomBytes(8).toString("hex")}`);
  try {
    const file = await open(temporary, "wx", 0o600);
    try {
      await file.writeFile(privateKeyPem + certificatePem);
      await file.sync();
    } finally {
      await file.close();
    }
    // Unlike rename, link refuses to replace.
    await link(temporary, path).catch((error: unknown) => {
      if (!isCode(error, "EEXIST")) throw error;
    });
  } finally {
    await rm(temporary, { force: true });
  }
  await syncFolder(folder);
  return readFile(path, "utf8");
}

/** The name is on the disk only when the folder is. */
async function syncFolder(folder: string): Promise<void> {
  const handle = await open(folder, "r");
  try {
    await handle.sync();
  } finally {
    await handle.close();
  }
}

async function assertPrivate(path: string): Promise<void> {
  const { mode } = await stat(path);
  if ((mode & 0o077) === 0) return;
  throw new Error(`${path} holds the CA's key and others may read it: chmod 600 it, and consider the key known`);
}

async function readIfThere(path: string): Promise<string | undefined> {
  try {
    return await readFile(path, "utf8");
  } catch (error) {
    if (isCode(error, "ENOENT")) return undefined;
    throw error;
  }
}

function isCode(error: unknown, code: string): boolean {
  return error instanceof Error && "code" in error && error.code === code;
}
