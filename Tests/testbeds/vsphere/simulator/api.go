package main

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync/atomic"
)

// tagAPI serves tags as vCenter does: under /rest (6.5 to 8), under /api (7.0.2 and later), or both. govmomi's simulator knows /rest.
type tagAPI struct {
	rest http.Handler
	// Set once the machines have their tags, which takes /rest.
	restIsGone atomic.Value
}

func (t *tagAPI) serveRest(w http.ResponseWriter, r *http.Request) {
	if t.restIsGone.Load() != nil {
		http.NotFound(w, r)
		return
	}
	t.rest.ServeHTTP(w, r)
}

// serveAPI has /rest answer. Under /api ids and actions bear no marks, and answers no wrapping.
func (t *tagAPI) serveAPI(w http.ResponseWriter, r *http.Request) {
	parts := strings.Split(strings.TrimPrefix(r.URL.Path, "/api/"), "/")
	if parts[0] == "cis" && len(parts) > 2 {
		parts = parts[1:]
	} else if len(parts) != 1 || parts[0] != "session" {
		http.NotFound(w, r)
		return
	}
	if len(parts) == 3 {
		parts[2] = "id:" + parts[2]
	}
	asked := r.Clone(r.Context())
	asked.URL = &url.URL{Path: "/rest/com/vmware/cis/" + strings.Join(parts, "/")}
	if action := r.URL.Query().Get("action"); action != "" {
		asked.URL.RawQuery = "~action=" + url.QueryEscape(action)
	}
	recorder := httptest.NewRecorder()
	t.rest.ServeHTTP(recorder, asked)
	var wrapped struct {
		Value json.RawMessage `json:"value"`
	}
	status := recorder.Code
	switch {
	case status != http.StatusOK:
	case r.Method == http.MethodDelete:
		status = http.StatusNoContent
	default:
		if err := json.Unmarshal(recorder.Body.Bytes(), &wrapped); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		if parts[0] == "session" {
			status = http.StatusCreated
		}
		// No list is an empty one.
		if wrapped.Value == nil || string(wrapped.Value) == "null" {
			wrapped.Value = json.RawMessage("[]")
		}
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(wrapped.Value)
}
