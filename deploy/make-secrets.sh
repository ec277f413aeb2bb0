#!/bin/sh
# Makes what compose.yaml mounts as secrets, in deploy/secrets or the folder that is named. What is there stays.
#
# The folder can be entered by its owner alone. The files in it can be read by all: containers get them as they are,
# each under a user id of its own.
set -eu
umask 077
folder=${1:-$(dirname "$0")/secrets}
mkdir -p "$folder"
chmod 0700 "$folder"
cd "$folder"

# random BYTES: that many random bytes, in hex.
random() {
    head -c "$1" /dev/urandom | od -An -v -tx1 | tr -d ' \n'
}

# keep NAME TEXT: a file with this text, all of it or none, unless there is one.
keep() {
    [ -e "$1" ] && return
    printf '%s\n' "$2" >".$1"
    chmod 0444 ".$1"
    mv ".$1" "$1"
    echo "made $folder/$1"
}

# field NAME: a value in the file of S3 keys.
field() {
    sed -n "s/^$1 = //p" s3_credentials
}

keep api_key "lk_$(random 32)"
keep ray_token "$(random 32)"
keep grafana_password "$(random 16)"
keep postgres_password "$(random 32)"
keep database_url "postgresql://lockstep:$(cat postgres_password)@postgres:5432/lockstep"
keep s3_credentials "[default]
aws_access_key_id = $(random 10)
aws_secret_access_key = $(random 20)"
keep s3_auth_key "\"$(field aws_access_key_id),$(field aws_secret_access_key)\""
