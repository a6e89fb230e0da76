// A vCenter, or a single ESXi host, made of govmomi's simulator and what that lacks: TLS, exports with NFC streams, assigned devices
// of every kind, host PCI lists, paging, and faults on demand. Started by ../run, whose --help names the faults.
package main

import (
	"crypto/tls"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/vmware/govmomi/simulator"
	vapi "github.com/vmware/govmomi/vapi/simulator"
)

type options struct {
	dir          string
	machines     string
	user         string
	vms          int
	seed         int64
	esx          bool
	page         int
	port         int
	leaseTimeout time.Duration
	tags         string
	verbose      bool
}

func main() {
	var o options
	flag.StringVar(&o.dir, "dir", "", "folder for addresses, certificates and disks")
	flag.StringVar(&o.machines, "machines", "", "folder of machines with real disks, NAME/{machine.json,disk1.vmdk,…}")
	flag.StringVar(&o.user, "user", "administrator@vsphere.local", "the user who may log in")
	flag.IntVar(&o.vms, "vms", 24, "random machines")
	flag.Int64Var(&o.seed, "seed", 1, "seed of the random inventory")
	flag.BoolVar(&o.esx, "esx", false, "a single ESXi host")
	flag.IntVar(&o.page, "page", 500, "objects in one answer of the property collector")
	flag.IntVar(&o.port, "port", 0, "port of the first address; 0: any")
	flag.DurationVar(&o.leaseTimeout, "lease-timeout", 300*time.Second, "time without progress after which a lease dies")
	flag.StringVar(&o.tags, "tags", "both", "where a vCenter serves tags: rest, api or both")
	flag.BoolVar(&o.verbose, "verbose", false, "log every request")
	flag.Parse()
	if err := serve(o); err != nil {
		fmt.Fprintln(os.Stderr, "simulator:", err)
		os.Exit(1)
	}
}

func serve(o options) error {
	if !o.verbose {
		log.SetOutput(io.Discard)
	}
	password, err := os.ReadFile(filepath.Join(o.dir, "password"))
	if err != nil {
		return err
	}
	authority, err := newAuthority(o.dir)
	if err != nil {
		return err
	}
	good, err := authority.issue("localhost")
	if err != nil {
		return err
	}
	other, err := selfSigned("localhost")
	if err != nil {
		return err
	}
	host, err := selfSigned("esxi.example")
	if err != nil {
		return err
	}

	store := newDiskStore(filepath.Join(o.dir, "disks"))
	world, err := newWorld(o, store)
	if err != nil {
		return err
	}
	defer world.model.Remove()

	server := &server{world: world, faults: newFaults(), page: o.page, live: map[string]bool{}, calls: map[string]int{}}
	server.leases = newLeases(server, o.leaseTimeout)
	service := world.model.Service
	service.RegisterSDK(simulator.Map)
	server.service = service
	registerCollector()

	listener, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", o.port))
	if err != nil {
		return err
	}
	hostListener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	otherListener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	control, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	address := func(l net.Listener) string { return fmt.Sprintf("localhost:%d", l.Addr().(*net.TCPAddr).Port) }
	secret := strings.TrimSpace(string(password))
	service.Listen = &url.URL{Scheme: "https", Host: address(listener), Path: "/sdk", User: url.UserPassword(o.user, secret)}
	server.user, server.password = o.user, secret
	server.thumbprint, server.hostThumbprint = thumbprint(good), thumbprint(host)
	server.hostAddress = address(hostListener)

	mux := http.NewServeMux()
	mux.HandleFunc("/sdk", server.sdk)
	mux.HandleFunc("/sdk/vimServiceVersions.xml", service.ServiceVersions)
	mux.HandleFunc("/nfc/", server.nfc)
	mux.HandleFunc("/folder/", server.folder)
	tags := &tagAPI{}
	if !o.esx {
		path, rest := vapi.New(service.Listen, simulator.Map.OptionManager().Setting)
		service.Handle(path, rest)
		tags.rest = rest
		mux.HandleFunc(path, tags.serveRest)
		if o.tags != "rest" {
			mux.HandleFunc("/api/", tags.serveAPI)
		}
	}

	failed := make(chan error, 4)
	start := func(l net.Listener, certificate *tls.Certificate, handler http.Handler) {
		web := &http.Server{Handler: handler, ErrorLog: log.Default()}
		if certificate != nil {
			// The servers this stands for speak HTTP/1.1 only.
			web.TLSNextProto = map[string]func(*http.Server, *tls.Conn, http.Handler){}
			web.TLSConfig = &tls.Config{
				Certificates:                []tls.Certificate{*certificate},
				MinVersion:                  tls.VersionTLS12,
				DynamicRecordSizingDisabled: true,
			}
			go func() { failed <- web.ServeTLS(l, "", "") }()
		} else {
			go func() { failed <- web.Serve(l) }()
		}
	}
	start(listener, good, mux)
	start(hostListener, host, mux)
	start(otherListener, other, mux)
	start(control, nil, server.control())

	if !o.esx {
		if err := world.attachTags(service.Listen); err != nil {
			return fmt.Errorf("tags: %w", err)
		}
		if o.tags == "api" {
			tags.restIsGone.Store(true)
		}
	}
	server.forget()

	for name, text := range map[string]string{
		"user":         o.user,
		"fingerprint":  fingerprint(good),
		"other-url":    "https://" + address(otherListener) + "/sdk",
		"nfc-host-url": "https://" + server.hostAddress,
		"control":      "http://" + address(control),
		"url":          "https://" + address(listener) + "/sdk",
	} {
		if err := writeFile(filepath.Join(o.dir, name), text+"\n"); err != nil {
			return err
		}
	}
	if err := writeFile(filepath.Join(o.dir, "ready"), "yes\n"); err != nil {
		return err
	}

	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, syscall.SIGINT)
	select {
	case <-stop:
		return nil
	case err := <-failed:
		return err
	}
}

func writeFile(path, text string) error {
	if err := os.WriteFile(path+".new", []byte(text), 0600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}
