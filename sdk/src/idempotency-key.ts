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
  // create() takes over what it is given, and retries must not see what the caller does to it meanwhile.
  const message = clone(schema, create(schema, input));
  const field = schema.fields.find((candidate) => candidate.name === "idempotency_key");
  if (field === undefined) return { message, hasKey: false };
  const fields = reflect(schema, message);
  if (fields.get(field) === "") fields.set(field, globalThis.crypto.randomUUID());
  return { message, hasKey: true };
}
