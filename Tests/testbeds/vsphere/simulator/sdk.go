package main

import (
	"bytes"
	"encoding/xml"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// server is everything behind the addresses: it looks at each SOAP call before govmomi's simulator gets it.
type server struct {
	world      *world
	service    *simulator.Service
	faults     *faults
	leases     *leases
	page       int
	user       string
	password   string
	thumbprint string
	// The NFC address of an ESXi host of its own, with a certificate nobody signed.
	hostAddress    string
	hostThumbprint string

	mutex sync.Mutex
	// Session keys that are logged in.
	live  map[string]bool
	calls map[string]int
}

// Calls that need no session on a real server.
var open = map[string]bool{"RetrieveServiceContent": true, "Login": true, "CurrentTime": true, "Fetch": true}

func (s *server) sdk(w http.ResponseWriter, r *http.Request) {
	if s.faults.answer(w, r, "sdk", "", 0) {
		return
	}
	body, err := io.ReadAll(io.LimitReader(r.Body, 64<<20))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	method, err := simulator.UnmarshalBody(types.TypeFunc(), body)
	if err == nil {
		s.mutex.Lock()
		s.calls[method.Name]++
		s.mutex.Unlock()
		if !open[method.Name] && !s.authenticated(r) {
			fault(w, "The session is not authenticated.", "NotAuthenticated", fmt.Sprintf(
				`<object type="%s">%s</object><privilegeId>System.View</privilegeId>`, escape(method.This.Type), escape(method.This.Value)))
			return
		}
		if vm, ok := simulator.Map.Get(method.This).(*simulator.VirtualMachine); ok && method.Name == "CreateSnapshot_Task" && runsOnHostDevice(vm) {
			fault(w, "The operation is not supported on the object.", "NotSupported", "")
			return
		}
		if method.Name == "CreateSnapshot_Task" && s.faults.has("branch", method.This.Value, 0) {
			s.world.branch(method.This)
		}
		switch method.Name {
		case "ExportVm", "ExportSnapshot":
			// The simulator finds methods on the object they are called on; its machines have none for this.
			exporter := s.leases.exporter(method.This)
			body = redirect(body, exporter)
		case "CreateSnapshot_Task", "RemoveSnapshot_Task":
			if to := s.slowly(method.Name, method.This); to != method.This {
				body = redirect(body, to)
			}
		}
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	if method != nil && method.Name == "Login" {
		// A second login on a live session is a new session, as on a real server.
		r.Header.Del("Cookie")
	}
	s.service.ServeSDK(w, r)
	if method == nil {
		return
	}
	switch method.Name {
	case "Login":
		for _, cookie := range (&http.Response{Header: w.Header()}).Cookies() {
			if cookie.Name == soap.SessionCookieName {
				s.mutex.Lock()
				s.live[cookie.Value] = true
				s.mutex.Unlock()
			}
		}
	case "Logout":
		if cookie, err := r.Cookie(soap.SessionCookieName); err == nil {
			s.mutex.Lock()
			delete(s.live, cookie.Value)
			s.mutex.Unlock()
		}
	}
}

// redirect has a call go to another object: the text of _this is replaced, nothing else.
func redirect(body []byte, to types.ManagedObjectReference) []byte {
	text := string(body)
	at := strings.Index(text, "_this")
	if at < 0 {
		return body
	}
	start := strings.LastIndex(text[:at], "<")
	tag := text[start+1 : at+len("_this")]
	end := strings.Index(text[at:], "</"+tag+">")
	if start < 0 || end < 0 {
		return body
	}
	return []byte(text[:start] + fmt.Sprintf(`<%s type="%s">%s`, tag, to.Type, escape(to.Value)) + text[at+end:])
}

func (s *server) authenticated(r *http.Request) bool {
	cookie, err := r.Cookie(soap.SessionCookieName)
	if err != nil {
		return false
	}
	s.mutex.Lock()
	defer s.mutex.Unlock()
	return s.live[strings.Trim(cookie.Value, `"`)]
}

// expire forgets every session.
func (s *server) expire() int {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	n := len(s.live)
	s.live = map[string]bool{}
	return n
}

// forget clears what starting up has counted.
func (s *server) forget() {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	s.calls = map[string]int{}
}

func escape(text string) string {
	var out bytes.Buffer
	_ = xml.EscapeText(&out, []byte(text))
	return out.String()
}

func fault(w http.ResponseWriter, message, kind, detail string) {
	w.Header().Set("Content-Type", "text/xml; charset=utf-8")
	w.WriteHeader(http.StatusInternalServerError)
	fmt.Fprintf(w, `<?xml version="1.0" encoding="UTF-8"?>
<soapenv:Envelope xmlns:soapenv="http://schemas.xmlsoap.org/soap/envelope/" xmlns:xsd="http://www.w3.org/2001/XMLSchema" `+
		`xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"><soapenv:Body><soapenv:Fault><faultcode>ServerFaultCode</faultcode>`+
		`<faultstring>%s</faultstring><detail><%sFault xmlns="urn:vim25" xsi:type="%s">%s</%sFault></detail></soapenv:Fault>`+
		`</soapenv:Body></soapenv:Envelope>`, escape(message), kind, kind, detail, kind)
}
