package main

import (
	"fmt"
	"math"
	"net/http"
	"net/url"
	"strconv"
	"sync"
	"time"
)

// rule is one fault on demand; the zero value of a filter fits everything.
type rule struct {
	Kind  string `json:"kind"`
	Path  string `json:"path,omitempty"` // sdk, nfc or folder
	VM    string `json:"vm,omitempty"`   // id
	Disk  int    `json:"disk"`           // -1: any
	After int64  `json:"after,omitempty"`
	Rate  int64  `json:"rate,omitempty"`
	Code  int    `json:"code,omitempty"`
	// How often it still happens; negative: always.
	Left int `json:"left"`
}

// kinds that a request's answer looks for; the others are done when they are asked for.
var kinds = map[string]bool{
	"cut": true, "truncate": true, "corrupt": true, "slow": true, "stall": true, "html": true, "status": true, "range200": true,
	"encoded":   true,
	"delete-vm": true, "expire-at": true, "nfc-host": true, "thumbprint": true, "length": true, "timeout-at": true,
	"no-tag": true, "slow-snapshot": true, "slow-removal": true, "branch": true, "merge-at": true,
}

type faults struct {
	mutex sync.Mutex
	rules []*rule
	hits  map[string]int
	// Bytes of disks that were sent, by path: "nfc" in all, "nfc/1" of second disks.
	sent map[string]int64
}

func newFaults() *faults { return &faults{hits: map[string]int{}, sent: map[string]int64{}} }

func number(q url.Values, name string, otherwise int64) (int64, error) {
	if q.Get(name) == "" {
		return otherwise, nil
	}
	n, err := strconv.ParseInt(q.Get(name), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%s is not a number", name)
	}
	return n, nil
}

func (f *faults) add(q url.Values, vm string) error {
	r := &rule{Kind: q.Get("kind"), Path: q.Get("path"), VM: vm}
	if !kinds[r.Kind] {
		return fmt.Errorf("no fault %q", r.Kind)
	}
	var disk, code, times int64
	for _, field := range []struct {
		name      string
		otherwise int64
		to        *int64
	}{{"disk", -1, &disk}, {"after", 0, &r.After}, {"rate", 1 << 20, &r.Rate}, {"code", 503, &code}, {"times", 1, &times}} {
		value, err := number(q, field.name, field.otherwise)
		if err != nil {
			return err
		}
		*field.to = value
	}
	r.Disk, r.Code, r.Left = int(disk), int(code), int(times)
	if times == 0 {
		r.Left = -1
	}
	f.mutex.Lock()
	f.rules = append(f.rules, r)
	f.mutex.Unlock()
	return nil
}

func (f *faults) clear() {
	f.mutex.Lock()
	f.rules, f.hits, f.sent = nil, map[string]int{}, map[string]int64{}
	f.mutex.Unlock()
}

// take finds the faults that hold for an answer and counts them down.
func (f *faults) take(path, vm string, disk int, wanted ...string) map[string]rule {
	return f.takeWithin(math.MaxInt64, path, vm, disk, wanted...)
}

// takeWithin leaves those alone that would happen behind the end of an answer of so many bytes.
func (f *faults) takeWithin(length int64, path, vm string, disk int, wanted ...string) map[string]rule {
	f.mutex.Lock()
	defer f.mutex.Unlock()
	found := map[string]rule{}
	for _, r := range f.rules {
		if _, known := found[r.Kind]; known || r.Left == 0 || r.After >= length || r.Path != "" && r.Path != path || r.VM != "" && r.VM != vm || r.Disk >= 0 && r.Disk != disk {
			continue
		}
		for _, kind := range wanted {
			if kind == r.Kind {
				found[kind] = *r
				f.hits[kind]++
				if r.Left > 0 {
					r.Left--
				}
			}
		}
	}
	return found
}

func (f *faults) has(kind, vm string, disk int) bool {
	_, found := f.take("", vm, disk, kind)[kind]
	return found
}

func (f *faults) count(path string, bytes int64) {
	f.mutex.Lock()
	f.sent[path] += bytes
	f.mutex.Unlock()
}

// answer gives an answer that has nothing to do with the request, if one is asked for.
func (f *faults) answer(w http.ResponseWriter, _ *http.Request, path, vm string, disk int) bool {
	found := f.take(path, vm, disk, "html", "status")
	if _, is := found["html"]; is {
		w.Header().Set("Content-Type", "text/html")
		fmt.Fprint(w, "<!DOCTYPE html><html><head><title>Sign in</title></head><body><h1>This network needs a sign-in</h1></body></html>\n")
		return true
	}
	if r, is := found["status"]; is {
		http.Error(w, http.StatusText(r.Code), r.Code)
		return true
	}
	return false
}

// body sends a disk with what goes wrong on its way. Faults at a position count from the start of the answer.
func (s *server) body(w http.ResponseWriter, lease *HttpNfcLease, d *disk, index int, path string, from reader, first, count int64) {
	found := s.faults.takeWithin(count, path, d.vmID(), index, "cut", "truncate", "corrupt", "slow", "stall", "delete-vm", "expire-at", "timeout-at", "merge-at")
	done := make(<-chan struct{})
	if lease != nil {
		done = lease.context.Done()
	}
	buffer := make([]byte, 1<<20)
	due := time.Now()
	var sent int64
	limit := count
	ends := ""
	for _, kind := range []string{"cut", "truncate", "stall", "delete-vm"} {
		if r, is := found[kind]; is && r.After < limit {
			limit, ends = r.After, kind
		}
	}
	for sent < limit {
		select {
		case <-done:
			panic(http.ErrAbortHandler)
		default:
		}
		piece := int64(len(buffer))
		slow, isSlow := found["slow"]
		if isSlow && piece > slow.Rate/10+1 {
			piece = slow.Rate/10 + 1
		}
		if piece > limit-sent {
			piece = limit - sent
		}
		n, err := from.ReadAt(buffer[:piece], first+sent)
		if int64(n) < piece {
			_ = err
			panic(http.ErrAbortHandler)
		}
		if r, is := found["corrupt"]; is && sent <= r.After && r.After < sent+piece {
			buffer[r.After-sent] ^= 0xff
		}
		if r, is := found["expire-at"]; is && sent <= r.After && r.After < sent+piece {
			s.expire()
		}
		if r, is := found["merge-at"]; is && sent <= r.After && r.After < sent+piece {
			s.world.merge(d.vm)
		}
		if r, is := found["timeout-at"]; is && lease != nil && sent <= r.After && r.After < sent+piece {
			lease.fail("timedOut", timedOut, "The lease timed out.")
		}
		if _, err := w.Write(buffer[:piece]); err != nil {
			return
		}
		sent += piece
		s.faults.count(path, piece)
		s.faults.count(fmt.Sprintf("%s/%d", path, index), piece)
		if isSlow {
			if flusher, can := w.(http.Flusher); can {
				flusher.Flush()
			}
			// As a link: what a slow reader missed doesn't come faster later, what a timer missed does.
			if late := time.Now().Add(-50 * time.Millisecond); due.Before(late) {
				due = late
			}
			due = due.Add(time.Duration(float64(piece) / float64(slow.Rate) * float64(time.Second)))
			select {
			case <-done:
				panic(http.ErrAbortHandler)
			case <-time.After(time.Until(due)):
			}
		}
	}
	if ends != "" && ends != "truncate" {
		if flusher, can := w.(http.Flusher); can {
			flusher.Flush()
		}
	}
	switch ends {
	case "cut":
		panic(http.ErrAbortHandler)
	case "stall":
		select {
		case <-done:
		case <-time.After(10 * time.Minute):
		}
		panic(http.ErrAbortHandler)
	case "delete-vm":
		s.world.remove(d.vmID())
		s.leases.killAll("failed", gone(d.vm).Detail.Fault.(faultType), "The machine was deleted.",
			func(l *HttpNfcLease) bool { return l.vm == d.vm })
		panic(http.ErrAbortHandler)
	}
}
