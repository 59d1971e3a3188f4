#!/bin/sh
# The MLflow server with logins; its secrets come from files.
#
# SECRETS (default /run/secrets): the folder of the files postgres, admin, session, s3-id and s3-key.
# DATABASE: host[:port] of PostgreSQL, with the databases mlflow and logins of a user mlflow.
# BUCKET: where artifacts go (s3://…). MLFLOW_S3_ENDPOINT_URL: the object store that has it.
# HOSTS: the host names that clients use.
#
# Secrets reach MLflow through its environment and a file of mode 0600, because every user of the
# machine can read the arguments of a process.
set -eu
umask 077
secret() { cat "${SECRETS:-/run/secrets}/$1"; }

server="postgresql+psycopg2://mlflow:$(secret postgres)@$DATABASE"
export MLFLOW_BACKEND_STORE_URI="$server/mlflow"
export MLFLOW_AUTH_ADMIN_USERNAME="${ADMIN:-admin}"
MLFLOW_AUTH_ADMIN_PASSWORD="$(secret admin)"
MLFLOW_FLASK_SERVER_SECRET_KEY="$(secret session)"
AWS_ACCESS_KEY_ID="$(secret s3-id)"
AWS_SECRET_ACCESS_KEY="$(secret s3-key)"
export MLFLOW_AUTH_ADMIN_PASSWORD MLFLOW_FLASK_SERVER_SECRET_KEY AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY

export MLFLOW_AUTH_CONFIG_PATH="${TMPDIR:-/tmp}/auth.ini"
cat > "$MLFLOW_AUTH_CONFIG_PATH" <<END
[mlflow]
default_permission = READ
database_uri = $server/logins
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
END

exec mlflow server --app-name basic-auth --workers "${WORKERS:-4}" \
    --host "${BIND:-0.0.0.0}" --port "${PORT:-5000}" \
    --artifacts-destination "$BUCKET" --allowed-hosts "$HOSTS"
