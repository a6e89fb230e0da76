#pragma once
#include <curl/curl.h>

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
