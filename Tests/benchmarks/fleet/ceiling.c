// What the broker gives a bare C client: publishes with confirms to a quorum queue, then consumes with acks.
// usage: ceiling PORT USER PASSWORD COUNT BYTES; prints the two rates per second.
#include <amqp.h>
#include <amqp_framing.h>
#include <amqp_tcp_socket.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static void check(int ok, const char *what) {
    if (ok) return;
    fprintf(stderr, "ceiling: %s failed\n", what);
    exit(1);
}

static int normal(amqp_connection_state_t connection) {
    return amqp_get_rpc_reply(connection).reply_type == AMQP_RESPONSE_NORMAL;
}

int main(int argc, char **argv) {
    check(argc == 6, "usage: ceiling PORT USER PASSWORD COUNT BYTES;");
    int count = atoi(argv[4]), size = atoi(argv[5]), window = 500;
    amqp_connection_state_t connection = amqp_new_connection();
    amqp_socket_t *socket = amqp_tcp_socket_new(connection);
    check(amqp_socket_open(socket, "127.0.0.1", atoi(argv[1])) == 0, "connect");
    check(amqp_login(connection, "/", 0, 131072, 0, AMQP_SASL_METHOD_PLAIN, argv[2], argv[3]).reply_type ==
              AMQP_RESPONSE_NORMAL, "login");
    amqp_channel_open(connection, 1);
    check(normal(connection), "channel");
    amqp_bytes_t queue = amqp_cstring_bytes("ceiling");
    amqp_table_entry_t type = {amqp_cstring_bytes("x-queue-type"), {AMQP_FIELD_KIND_UTF8, {.bytes = amqp_cstring_bytes("quorum")}}};
    amqp_table_t arguments = {1, &type};
    amqp_queue_declare(connection, 1, queue, 0, 1, 0, 0, arguments);
    check(normal(connection), "queue");
    amqp_confirm_select(connection, 1);
    check(normal(connection), "confirms");

    amqp_basic_properties_t properties = {._flags = AMQP_BASIC_DELIVERY_MODE_FLAG, .delivery_mode = 2};
    char *body = malloc(size);
    memset(body, 'x', size);
    double start = now();
    uint64_t confirmed = 0;
    for (int sent = 0; confirmed < (uint64_t)count;) {
        while (sent < count && sent - confirmed < (uint64_t)window) {
            amqp_bytes_t bytes = {size, body};
            check(amqp_basic_publish(connection, 1, amqp_empty_bytes, queue, 1, 0, &properties, bytes) == 0, "publish");
            sent++;
        }
        amqp_frame_t frame;
        amqp_maybe_release_buffers(connection);
        check(amqp_simple_wait_frame(connection, &frame) == 0, "confirm");
        if (frame.frame_type == AMQP_FRAME_METHOD && frame.payload.method.id == AMQP_BASIC_ACK_METHOD) {
            amqp_basic_ack_t *ack = frame.payload.method.decoded;
            confirmed = ack->multiple ? ack->delivery_tag : confirmed + 1;
        }
    }
    double published = count / (now() - start);

    amqp_basic_qos(connection, 1, 0, window, 0);
    amqp_basic_consume(connection, 1, queue, amqp_empty_bytes, 0, 0, 0, amqp_empty_table);
    start = now();
    for (int got = 1; got <= count; got++) {
        amqp_envelope_t envelope;
        amqp_maybe_release_buffers(connection);
        check(amqp_consume_message(connection, &envelope, NULL, 0).reply_type == AMQP_RESPONSE_NORMAL, "consume");
        if (got % 100 == 0 || got == count) amqp_basic_ack(connection, 1, envelope.delivery_tag, 1);
        amqp_destroy_envelope(&envelope);
    }
    double consumed = count / (now() - start);
    amqp_queue_delete(connection, 1, queue, 0, 0);
    amqp_connection_close(connection, AMQP_REPLY_SUCCESS);
    printf("%.0f %.0f\n", published, consumed);
}
