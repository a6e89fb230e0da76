#pragma once
#include <amqp.h>
#include <amqp_framing.h>
#include <amqp_ssl_socket.h>
#include <amqp_tcp_socket.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

// amqp_login_with_properties(3) is variadic, which Swift doesn't import: one wrapper per SASL mechanism.
static inline amqp_rpc_reply_t flotilla_amqp_login_plain(
    amqp_connection_state_t state, const char *vhost, int frame_max, int heartbeat, const amqp_table_t *properties,
    const char *user, const char *password) {
    return amqp_login_with_properties(
        state, vhost, 0, frame_max, heartbeat, properties, AMQP_SASL_METHOD_PLAIN, user, password);
}
// RabbitMQ takes the identity from the certificate and ignores the one that is sent, which librabbitmq 0.11 wants not
// to be empty.
static inline amqp_rpc_reply_t flotilla_amqp_login_external(
    amqp_connection_state_t state, const char *vhost, int frame_max, int heartbeat, const amqp_table_t *properties) {
    return amqp_login_with_properties(
        state, vhost, 0, frame_max, heartbeat, properties, AMQP_SASL_METHOD_EXTERNAL, "certificate");
}

// eventfd(2) that neither blocks nor survives an exec.
static inline int flotilla_eventfd(void) { return eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK); }

// TCP_USER_TIMEOUT of tcp(7): how long sent data may stay unacknowledged, or unsendable because the peer does not read.
static inline int flotilla_set_tcp_user_timeout(int socket, unsigned int milliseconds) {
    return setsockopt(socket, IPPROTO_TCP, TCP_USER_TIMEOUT, &milliseconds, sizeof milliseconds);
}

static inline struct timeval flotilla_timeval(long seconds, long microseconds) {
    struct timeval time = {seconds, microseconds};
    return time;
}
