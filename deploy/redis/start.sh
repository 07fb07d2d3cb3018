#!/bin/sh
# Starts redis-server with the users of users.acl: `start.sh [options of redis-server]`.
#
#   REDIS_PASSWORD         of the user `dycoke`: the API and the workers
#   KEDA_PASSWORD          of the user `keda`, which may ask for a stream's length; unset: no such user
#   DYCOKE_REDIS_PREFIX    of all keys (dycoke)
#   ACL_FILE               where the users go, with hashes instead of passwords (/tmp/users.acl)
set -eu
: "${REDIS_PASSWORD:?is not set: openssl rand -hex 32}"
if [ "${#REDIS_PASSWORD}" -lt 32 ]; then
  echo "REDIS_PASSWORD has fewer than 32 characters: openssl rand -hex 32" >&2
  exit 2
fi

sha256() { printf %s "$1" | sha256sum | cut -d' ' -f1; }

umask 077
file=${ACL_FILE:-/tmp/users.acl}
users=$(dirname "$0")/users.acl
if [ -z "${KEDA_PASSWORD:-}" ]; then
  sed '/^user keda /d' "$users"
else
  sed "s/KEDA_PASSWORD_SHA256/$(sha256 "$KEDA_PASSWORD")/" "$users"
fi | sed "s/PASSWORD_SHA256/$(sha256 "$REDIS_PASSWORD")/; s/PREFIX:/${DYCOKE_REDIS_PREFIX:-dycoke}:/g" > "$file"
unset REDIS_PASSWORD KEDA_PASSWORD
exec redis-server --aclfile "$file" "$@"
