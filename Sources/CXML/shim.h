#pragma once
#include <libxml/xmlversion.h>
// Debian's libxml2 would bring its ICU's headers, which can't be in one program with those of Swift's Foundation. They
// only say what an encoding handler holds, which nothing here looks into.
#undef LIBXML_ICU_ENABLED
#include <libxml/xmlreader.h>
#include <libxml/parser.h>
#include <libxml/tree.h>
#include <libxml/xmlwriter.h>
