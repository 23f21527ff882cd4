/** One key for each logical call, shared by its retries: a retry of a call that did arrive has no second effect. */
import { clone, create, type DescMessage, type MessageInitShape, type MessageShape } from "@bufbuild/protobuf";
import { reflect } from "@bufbuild/protobuf/reflect";

/**
 * Returns the message, with a new idempotency key where its type has one and the caller gave none. The
 * caller's object is not touched.
 */
export function withIdempotencyKey<D extends DescMessage>(
  schema: D,
  input: MessageInitShape<D>,
): { readonly message: MessageShape<D>; readonly hasKey: boolean } {
  const message = create(schema, input);
  const field = schema.fields.find((candidate) => candidate.name === "idempotency_key");
  if (field === undefined) return { message, hasKey: false };
  if (reflect(schema, message).get(field) !== "") return { message, hasKey: true };
  // create() returns a message that it was given as it is.
  const keyed = clone(schema, message);
  reflect(schema, keyed).set(field, globalThis.crypto.randomUUID());
  return { message: keyed, hasKey: true };
}
