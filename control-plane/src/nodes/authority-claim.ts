// Which CA a database is served with. A replica with another one is found at its start, and not by the nodes that it
// enrolls and the others refuse.
import type { SystemTx } from "../platform/database.ts";

/** The database is served with another CA. The message says what to do. */
export class AuthorityClaimError extends Error {
  constructor(claimed: string, own: string) {
    super(
      `this database is served with another CA: ${claimed.slice(0, 16)}…, and this process has ${own.slice(0, 16)}… ` +
        "(sha256 of the certificate); give every replica the same CLODEI_CA_CERTIFICATE_FILE and CLODEI_CA_KEY_FILE. " +
        "Where the CA was replaced on purpose, forget-ca lets the next start claim the database, and nodes are enrolled again",
    );
    this.name = "AuthorityClaimError";
  }
}

/** Claims the database for a CA, by its certificate's sha256 in hexadecimal. @throws AuthorityClaimError. */
export async function claimAuthority(tx: SystemTx, digestHex: string): Promise<void> {
  await tx.execute("insert into authority_claim (ca_sha256) values ($1) on conflict do nothing", [digestHex]);
  const [row] = await tx.query<{ ca_sha256: string }>("select ca_sha256 from authority_claim");
  if (row?.ca_sha256 !== digestHex) throw new AuthorityClaimError(row?.ca_sha256 ?? "", digestHex);
}

/** Lets the next start claim the database. @returns whether it was claimed. */
export async function forgetAuthority(tx: SystemTx): Promise<boolean> {
  return (await tx.execute("delete from authority_claim")) === 1;
}
