// Tempo in one process, as its own command runs it, for `-config.file=FILE`.
//
// Its own command does not work with a Go of today. Tempo replaces gRPC's codec, because some of its messages can only
// be encoded by gogo; it does so while packages are initialised, and since Go 1.21 gRPC's own comes after it.
package main

import (
	"flag"
	"fmt"
	"os"

	gogo "github.com/gogo/protobuf/proto"
	"github.com/grafana/tempo/cmd/tempo/app"
	"github.com/grafana/tempo/pkg/util/log"
	"google.golang.org/grpc/encoding"
	standard "google.golang.org/grpc/encoding/proto"
	"google.golang.org/protobuf/proto"
	"gopkg.in/yaml.v2"
)

// codec takes gogo for every message that the standard library does not know.
type codec struct{}

func (codec) Name() string { return standard.Name }

func (codec) Marshal(message interface{}) ([]byte, error) {
	if known, ok := message.(proto.Message); ok {
		return proto.Marshal(known)
	}
	return gogo.Marshal(message.(gogo.Message))
}

func (codec) Unmarshal(data []byte, message interface{}) error {
	if known, ok := message.(proto.Message); ok {
		return proto.Unmarshal(data, known)
	}
	return gogo.Unmarshal(data, message.(gogo.Message))
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "tempo:", err)
		os.Exit(1)
	}
}

func run() error {
	// main is initialised last, whatever the order of the others.
	encoding.RegisterCodec(codec{})
	config := app.Config{}
	config.RegisterFlagsAndApplyDefaults("", flag.CommandLine)
	file := flag.String("config.file", "tempo.yaml", "configuration")
	flag.Parse()
	content, err := os.ReadFile(*file)
	if err != nil {
		return err
	}
	if err := yaml.UnmarshalStrict(content, &config); err != nil {
		return err
	}
	log.InitLogger(&config.Server)
	tempo, err := app.New(config)
	if err != nil {
		return err
	}
	return tempo.Run()
}
