#!/bin/sh
# Creates the certificates in this directory with OpenSSL 3.0: the inputs of the tests of
# agent/src/values/ca_bundle.rs. The keys are discarded. Valid certificates are valid for a hundred
# years; the tests of validity use their own clock.
set -eu
cd "$(dirname "$0")"
keys=$(mktemp -d)
trap 'rm -rf "$keys"' EXIT

key() { openssl ecparam -name prime256v1 -genkey -noout -out "$keys/$1.key"; }

# self_signed NAME SUBJECT EXTENSIONS…: X.509 v3, with exactly these extensions.
self_signed() {
    name=$1 subject=$2
    shift 2
    key "$name"
    { printf '[req]\ndistinguished_name=dn\n[dn]\n[ext]\n'; printf '%s\n' "$@"; } >"$keys/$name.cnf"
    openssl req -x509 -new -config "$keys/$name.cnf" -extensions ext -utf8 -days 36500 \
        -key "$keys/$name.key" -subj "$subject" -out "$name.crt"
}

CA='basicConstraints=critical,CA:TRUE'
self_signed hospital-ca '/O=Klinikum Süd/CN=hospital-ca' \
    "$CA" 'keyUsage=critical,keyCertSign,cRLSign'
self_signed no-constraints /CN=no-constraints 'subjectKeyIdentifier=hash'
self_signed no-cert-sign /CN=no-cert-sign "$CA" 'keyUsage=critical,digitalSignature'
self_signed hostile-name \
    "/CN=$(printf 'a\033[31m\nb')$(printf '%050d' 0)" 'basicConstraints=CA:FALSE'

# X.509 v1: a self-signed certificate without extensions, and one signed by the CA above.
key v1
openssl req -new -key "$keys/v1.key" -subj /CN=v1-root -out request.csr
openssl x509 -req -in request.csr -signkey "$keys/v1.key" -days 36500 -out v1-root.crt
openssl x509 -req -in request.csr -CA hospital-ca.crt -CAkey "$keys/hospital-ca.key" \
    -set_serial 2 -days 36500 -out v1-leaf.crt
openssl pkey -in "$keys/v1.key" -pubout -out public.pem

# A typical web server certificate.
printf 'basicConstraints=CA:FALSE\nsubjectAltName=DNS:superlink.example\n' >"$keys/leaf.ext"
key leaf
openssl req -new -key "$keys/leaf.key" -subj /CN=superlink.example -out "$keys/leaf.csr"
openssl x509 -req -in "$keys/leaf.csr" -CA hospital-ca.crt -CAkey "$keys/hospital-ca.key" \
    -set_serial 3 -days 36500 \
    -extfile "$keys/leaf.ext" -out leaf.crt

# Valid from 2020-01-01 to 2024-05-01.
key old
: >"$keys/index"
cat >"$keys/old.cnf" <<END
[ca]
default_ca=old
[old]
database=$keys/index
new_certs_dir=$keys
serial=$keys/serial
default_md=sha256
policy=policy
x509_extensions=ext
[policy]
commonName=supplied
[ext]
$CA
END
echo 01 >"$keys/serial"
openssl req -new -key "$keys/old.key" -subj /CN=old-ca -out "$keys/old.csr"
openssl ca -batch -selfsign -config "$keys/old.cnf" -in "$keys/old.csr" -keyfile "$keys/old.key" \
    -notext \
    -startdate 20200101000000Z -enddate 20240501000000Z -out old-ca.crt

openssl crl2pkcs7 -nocrl -certfile hospital-ca.crt -out chain.p7b
