#pragma once
#include <curl/curl.h>
#include <openssl/evp.h>
#include <openssl/ssl.h>
#include <openssl/x509.h>
#include <string.h>

// curl_easy_setopt, curl_easy_getinfo and curl_multi_setopt are variadic, which Swift can't call: one function per type
// of value.
static inline CURLcode flotilla_curl_set_long(CURL *handle, CURLoption option, long value) {
    return curl_easy_setopt(handle, option, value);
}
static inline CURLcode flotilla_curl_set_text(CURL *handle, CURLoption option, const char *value) {
    return curl_easy_setopt(handle, option, value);
}
static inline CURLcode flotilla_curl_set_pointer(CURL *handle, CURLoption option, void *value) {
    return curl_easy_setopt(handle, option, value);
}
// Body bytes or a header line; returns the count taken, CURL_WRITEFUNC_PAUSE, or another number to end the transfer.
typedef size_t (*flotilla_curl_sink)(char *bytes, size_t size, size_t count, void *context);
static inline CURLcode flotilla_curl_set_sink(CURL *handle, CURLoption option, flotilla_curl_sink sink) {
    return curl_easy_setopt(handle, option, sink);
}
static inline long flotilla_curl_status(CURL *handle) {
    long status = 0;
    curl_easy_getinfo(handle, CURLINFO_RESPONSE_CODE, &status);
    return status;
}
// The result of the transfer that ended last on `multi`, or -1 while none has.
static inline int flotilla_curl_ended(CURLM *multi) {
    int left = 0;
    CURLMsg *message = curl_multi_info_read(multi, &left);
    return message && message->msg == CURLMSG_DONE ? (int)message->data.result : -1;
}
static const size_t flotilla_curl_pause = CURL_WRITEFUNC_PAUSE;

// A certificate that is trusted for its digest alone, whoever signed it and whatever name it bears.
struct flotilla_pin {
    // 20 for SHA-1, 32 for SHA-256.
    int length;
    unsigned char wanted[32];
    // What the server showed last; valid if `shown` isn't 0.
    unsigned char seen[32];
    int shown;
};
// Runs in the handshake, before anything is sent over the connection.
static int flotilla_verify_pin(X509_STORE_CTX *store, void *context) {
    struct flotilla_pin *pin = context;
    X509 *certificate = X509_STORE_CTX_get0_cert(store);
    unsigned int length = 0;
    const EVP_MD *type = pin->length == 20 ? EVP_sha1() : EVP_sha256();
    if (certificate && X509_digest(certificate, type, pin->seen, &length) == 1 && (int)length == pin->length) {
        pin->shown = 1;
        if (memcmp(pin->seen, pin->wanted, length) == 0) {
            X509_STORE_CTX_set_error(store, X509_V_OK);
            return 1;
        }
    }
    X509_STORE_CTX_set_error(store, X509_V_ERR_APPLICATION_VERIFICATION);
    return 0;
}
static CURLcode flotilla_install_pin(CURL *handle, void *context, void *pin) {
    (void)handle;
    SSL_CTX_set_cert_verify_callback(context, flotilla_verify_pin, pin);
    return CURLE_OK;
}
// `pin` must outlive the handle.
static inline CURLcode flotilla_curl_set_pin(CURL *handle, struct flotilla_pin *pin) {
    CURLcode result = curl_easy_setopt(handle, CURLOPT_SSL_CTX_DATA, pin);
    if (result == CURLE_OK) result = curl_easy_setopt(handle, CURLOPT_SSL_CTX_FUNCTION, flotilla_install_pin);
    // A resumed session would skip the check, and no name in the certificate matters.
    if (result == CURLE_OK) result = curl_easy_setopt(handle, CURLOPT_SSL_SESSIONID_CACHE, 0L);
    if (result == CURLE_OK) result = curl_easy_setopt(handle, CURLOPT_SSL_VERIFYHOST, 0L);
    return result;
}
